"""The warnings of one run: which checks look when, and what is logged."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dreplica.agreement.hasher import Hasher
from dreplica.agreement.notices.bindings import warn_of_bindings
from dreplica.agreement.notices.finite import LossWatch, warn_of_values
from dreplica.agreement.notices.leftover import LeftoverWatch
from dreplica.agreement.notices.ranks import RankWatch
from dreplica.agreement.notices.rates import RateWatch
from dreplica.agreement.notices.unmoved import AverageWatch, ParameterWatch
from dreplica.agreement.subject import Batch, Subject
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.distributed.channel import Channel
from dreplica.state.fingerprint.stage import Stage

log = logging.getLogger(__name__)


class Notices:
    """The warnings of one run, each given once and logged on rank 0.

    Args:
        subject: The models and optimizers that are compared.
        channel: The control channel between all ranks.
        hasher: What computes the fingerprints.
        has_own_samples: True if each rank has its own samples, as those of one data-parallel model have.

    Attributes:
        warnings: The warnings so far, in their order. After `finish`, the same on all ranks.
    """

    def __init__(self, subject: Subject, channel: Channel, hasher: Hasher, has_own_samples: bool) -> None:
        self.warnings: list[Evidence] = []
        self._subject, self._channel = subject, channel
        self._loss, self._rates = LossWatch(), RateWatch(subject.optimizers)
        self._parameters, self._averages = ParameterWatch(subject), AverageWatch(subject)
        self._leftover = LeftoverWatch(subject)
        is_shared = has_own_samples and channel.size > 1
        self._ranks = RankWatch(channel, hasher, subject.model) if is_shared else None
        self._keys: set[tuple[str, str]] = set()

    def built(self, step: int) -> None:
        """Check the build, or the state from which a run resumes.

        Args:
            step: Number of steps taken before.
        """
        self._add(warn_of_bindings(self._subject))
        self._add(warn_of_values(self._subject.model, step))

    def step(self, step: int, batch: Batch | None, loss: Tensor | None, is_compared: bool) -> None:
        """Check a training step, before its comparison.

        Args:
            step: The step.
            batch: What the model was given, or None.
            loss: The loss, or None.
            is_compared: True if the step will be compared.
        """
        if loss is not None:
            self._add(self._loss.step(step, loss))
        self._add(self._rates.step(step))
        self._add(self._leftover.step(step))
        self._parameters.step()
        if self._ranks is not None and is_compared:
            self._ranks.step(step, batch, loss)

    def compared(self, step: int, stages: Mapping[str, Stage]) -> None:
        """Check the digests of a step on which all ranks agree.

        Note:
            Collective in the first two compared steps of a data-parallel model.

        Args:
            step: The step.
            stages: Its digests.
        """
        if "weights" in stages:
            found = self._parameters.compared(stages["weights"])
            if found and self._has("optimizer-not-bound"):  # which explains parameters that no optimizer holds
                found = [each for each in found if each.code != "parameter-not-optimized"]
            self._add(found)
            self._add(self._averages.compared(stages))
        if self._ranks is not None:
            self._add(self._ranks.compared(step))

    def finish(self, step: int) -> None:
        """Check the whole run, and exchange the warnings of all ranks.

        Note:
            Collective: call it on every rank.

        Args:
            step: Number of steps taken.
        """
        self.close()
        self._add(self._loss.finish())
        self._add(self._rates.finish())
        self._add(self._averages.finish())
        if step and not self._has("not-finite") and not self._has("loss-not-finite"):
            self._add(warn_of_values(self._subject.model, step))
        self._merge(self._channel.gather([each.as_dict() for each in self.warnings]))

    def close(self) -> None:
        """Remove hooks from parameters and optimizers."""
        self._leftover.close()
        self._parameters.close()

    def _has(self, code: str) -> bool:
        return any(each.code == code for each in self.warnings)

    def _merge(self, rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Take over the warnings of all ranks, those of rank 0 first, each once."""
        self.warnings, self._keys, known = [], set(), len(rows[0])
        for rank, row in enumerate(rows):
            prefix = f"rank {rank}: " if rank else ""
            self._take([Evidence(each["code"], prefix + each["text"], each["data"]) for each in row])
        self._log(self.warnings[known:])

    def _add(self, found: Iterable[Evidence]) -> None:
        """Note warnings that were not given yet, and log them."""
        if found:
            self._log(self._take(found))

    def _take(self, found: Iterable[Evidence]) -> list[Evidence]:
        """Note warnings, and return those that were not given yet."""
        new = []
        for each in found:
            key = each.code, str(each.data.get("tensor") or each.data.get("name") or "")
            if key not in self._keys:
                self._keys.add(key)
                new.append(each)
        self.warnings += new
        return new

    def _log(self, warnings: Iterable[Evidence]) -> None:
        if self._channel.rank == 0:
            for each in warnings:
                log.warning(each.text)
