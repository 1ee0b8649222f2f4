"""Does anything learn? Weights that stand still over an epoch, whatever the buffers do."""

import torch

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.decision.conclude import not_learning
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Replica
from dreplica.state.stages import buffers_stage, named_weights, weights_stage


class LearningWatch:
    """Remembers a replica's digests at the build, to tell later whether its trainable weights have moved.

    `settled`: of a run that goes on, where that has been told already.
    """

    def __init__(self, replica: Replica, settled: bool = False) -> None:
        self._settled = settled
        model = replica.model
        self._trainable = {name for name, parameter in named_weights(model).items() if parameter.requires_grad}
        self._weights = weights_stage(model).entries()
        self._buffers = buffers_stage(model).digest
        self._rates = _learning_rates(replica.optimizer)

    def settle(self, replica: Replica, channel: Channel, step: int, epoch: int) -> Verdict | None:
        """The verdict (`not-learning`) if the first epoch with a learning rate has left some replica's weights.

        A collective until it is settled, and called after each epoch.
        """
        if self._settled:
            return None
        if any(channel.gather(self.begins_later(replica))):
            return None  # a schedule that begins at a learning rate of 0
        self._settled = True
        still = channel.gather(self.evidence(replica) if self.stands_still(replica) else None)
        replica_ids = [replica_id for replica_id, evidence in enumerate(still) if evidence is not None]
        return not_learning(step, epoch, replica_ids, still[replica_ids[0]]) if replica_ids else None

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
