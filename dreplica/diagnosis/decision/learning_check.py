"""The check that weights change: some of them must change over an epoch, whether or not buffers do."""

import torch

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.decision.conclude import not_learning
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Replica
from dreplica.state.stages import buffers_stage, named_weights, weights_stage


class LearningWatch:
    """A replica's digests at the build, to determine later whether its trainable weights have changed.

    Args:
        replica: The replica, just built.
        settled: True for a resumed run that has already made the check.
    """

    def __init__(self, replica: Replica, settled: bool = False) -> None:
        self._settled = settled
        model = replica.model
        self._trainable = {name for name, parameter in named_weights(model).items() if parameter.requires_grad}
        self._weights = weights_stage(model).entries()
        self._buffers = buffers_stage(model).digest
        self._rates = _learning_rates(replica.optimizer)

    def settle(self, replica: Replica, channel: Channel, step: int, epoch: int) -> Verdict | None:
        """Return the verdict `not-learning` if the first epoch with a learning rate changed no weight of some replica.

        Note:
            Collective until it is settled. Call it after each epoch, on every rank.

        Args:
            replica: The replica, after the epoch.
            channel: The control process group.
            step: Number of steps taken.
            epoch: The epoch that has ended, counted from 1.
        """
        if self._settled:
            return None
        if any(channel.gather(self.begins_later(replica))):
            return None  # The schedule begins at a learning rate of 0.
        self._settled = True
        still = channel.gather(self.evidence(replica) if self.is_unchanged(replica) else None)
        replica_ids = [replica_id for replica_id, evidence in enumerate(still) if evidence is not None]
        return not_learning(step, epoch, replica_ids, still[replica_ids[0]]) if replica_ids else None

    def begins_later(self, replica: Replica) -> bool:
        """Return True if all learning rates were 0 until now and a schedule has just raised one."""
        before, self._rates = self._rates, _learning_rates(replica.optimizer)
        if any(before) or not any(self._rates):
            self._rates = before
            return False
        return True

    def is_unchanged(self, replica: Replica) -> bool:
        """Return True if there are trainable weights and none of their bits has changed since the build."""
        weights = weights_stage(replica.model).entries()
        return bool(self._trainable) and all(weights[name] == self._weights[name] for name in self._trainable)

    def evidence(self, replica: Replica) -> list[Evidence]:
        """Return what gradients, buffers and learning rates show about weights that did not change."""
        parameters = [parameter for parameter in replica.model.parameters() if parameter.requires_grad]
        without = sum(parameter.grad is None for parameter in parameters)
        zero = sum(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)
        moved = buffers_stage(replica.model).digest != self._buffers
        return [
            Evidence.of(
                "parameters-unchanged",
                num_trainable=len(self._trainable),
                buffers="changed" if moved else "did not change",
                buffers_changed=moved,
            ),
            Evidence.of("gradients-missing", num_none=without, num_zero=zero, num_parameters=len(parameters)),
            Evidence.of("learning-rates", before=self._rates, after=_learning_rates(replica.optimizer)),
        ]


def _learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
