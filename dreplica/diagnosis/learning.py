"""Does anything learn? Weights that stand still over an epoch, whatever the buffers do."""

import torch

from dreplica.agreement.stages import buffers_stage, named_weights, weights_stage
from dreplica.replica.replica import Replica


class LearningWatch:
    """Remembers a replica's digests at the build, to tell later whether its trainable weights have moved."""

    def __init__(self, replica: Replica) -> None:
        model = replica.model
        self._trainable = {name for name, parameter in named_weights(model).items() if parameter.requires_grad}
        self._weights = weights_stage(model).entries()
        self._buffers = buffers_stage(model).digest
        self._rates = _learning_rates(replica.optimizer)

    def begins_later(self, replica: Replica) -> bool:
        """Whether all learning rates were 0 until now, and a schedule has just raised one."""
        before, self._rates = self._rates, _learning_rates(replica.optimizer)
        if any(before) or not any(self._rates):
            self._rates = before
            return False
        return True

    def stands_still(self, replica: Replica) -> bool:
        """Whether there are trainable weights and none of them has changed a bit since the build."""
        weights = weights_stage(replica.model).entries()
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
            f"learning rates: {self._rates} at first, {_learning_rates(replica.optimizer)} after the epoch",
        ]


def _learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
