"""The results of an `Agreement` so far, as its attributes."""

from collections.abc import Mapping

from torch import Tensor

from dreplica.agreement.engine import Engine
from dreplica.agreement.hasher import Hasher
from dreplica.agreement.kept_state import Original
from dreplica.agreement.protocol import CombinedDigest
from dreplica.agreement.reference import ReferenceDifference
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.state.stages import Stage


class Results:
    """Attributes of `Agreement`."""

    _engine: Engine

    @property
    def original(self) -> Original:
        """What is known of the step at which replicas diverged. Internal, may change without notice."""
        return self._engine.original

    @property
    def divergence(self) -> Verdict | None:
        """Verdict of the first difference, or None."""
        return self._engine.divergence

    @property
    def warnings(self) -> list[Evidence]:
        """Warnings about what all replicas share, such as a loss of NaN: each has `code`, `text` and `data`."""
        return self._engine.notices.warnings

    @property
    def steps_done(self) -> int:
        """Number of calls of `step`, plus the argument `steps_done`."""
        return self._engine.steps_done

    @property
    def steps_checked(self) -> int:
        """Number of steps that were compared."""
        return self._engine.steps_checked

    @steps_checked.setter
    def steps_checked(self, steps: int) -> None:  # the trainer continues the count of an interrupted run
        self._engine.steps_checked = steps

    @property
    def bytes_per_step(self) -> int:
        """Bytes of tensors that this replica hashed in the newest compared step; 0 before it."""
        return self._engine.bytes_per_step

    @property
    def bytes_hashed(self) -> int:
        """Bytes of tensors that this replica hashed in total."""
        return self._engine.bytes_hashed

    @property
    def stages_compared(self) -> int:
        """Number of stages compared, summed over all comparisons."""
        return self._engine.stages_compared

    @property
    def stages_seen(self) -> set[str]:
        """Names of the stages that were compared at least once."""
        return self._engine.stages_seen

    @property
    def agreed_until(self) -> int:
        """Newest step at which all replicas are known to have agreed; -1 before the build."""
        return self._engine.agreed_until

    @property
    def last_digest(self) -> CombinedDigest | None:
        """Combined digest of what was compared last; None after a step that was not compared."""
        return self._engine.last_digest

    @property
    def generator_states(self) -> Mapping[str, Tensor | bytes | None]:
        """State of each global generator at the newest call of `step`, by its name in the stage `rng`."""
        return self._engine.generators.states

    @property
    def diverged_stages(self) -> dict[str, Stage]:
        """Digests of this replica's stages at the first difference."""
        return self._engine.diverged_stages

    @property
    def reference_difference(self) -> ReferenceDifference | None:
        """First difference from the reference, the same on all replicas, or None."""
        return self._engine.reference_difference

    @property
    def hasher(self) -> Hasher:
        """What computes the fingerprints."""
        return self._engine.hasher
