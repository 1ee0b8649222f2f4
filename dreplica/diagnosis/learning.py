"""Does anything learn? Weights that stand still over an epoch, whatever the buffers do."""

from torch import nn

from dreplica.agreement.stages import buffers_stage, weights_stage
from dreplica.replica.replica import Replica


class LearningWatch:
    """Remembers a model's digests at the build, to tell later whether its trainable weights have moved."""

    def __init__(self, model: nn.Module) -> None:
        self._trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._weights = weights_stage(model).entries()
        self._buffers = buffers_stage(model).digest

    def stands_still(self, model: nn.Module) -> bool:
        """Whether there are trainable weights and none of them has changed a bit since the build."""
        weights = weights_stage(model).entries()
        return bool(self._trainable) and all(weights[name] == self._weights[name] for name in self._trainable)

    def evidence(self, replica: Replica) -> list[str]:
        """Why that may be, as far as it can be seen from outside."""
        parameters = [parameter for parameter in replica.model.parameters() if parameter.requires_grad]
        without = sum(parameter.grad is None for parameter in parameters)
        zero = sum(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)
        moved = buffers_stage(replica.model).digest != self._buffers
        return [
            f"0 of {len(self._trainable)} trainable parameters changed; buffers {'changed' if moved else 'did not'}",
            f"gradients: {without} are None, {zero} are all zero, of {len(parameters)}",
            f"learning rates: {[float(group['lr']) for group in replica.optimizer.param_groups if 'lr' in group]}",
        ]
