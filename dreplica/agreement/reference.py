"""A recorded run with which one that is under way is compared, step by step."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dreplica.agreement.trace.comparison import part_at, place_of
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.verdict.location import Place, module_of
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.errors import UsageError
from dreplica.state.fingerprint.fingerprint import ALGORITHM
from dreplica.state.fingerprint.stage import INDEPENDENT_STAGES, Stage


@dataclass(frozen=True)
class Apart:
    """Where a run parts from its reference."""

    reference: str
    """Its path, as given."""
    place: Place
    """The reference is replica 1 of it."""
    recorded: dict[str, str]
    """What the reference has there: stage to 32 hex digits."""
    is_first: bool
    """Whether no training step before it has been compared."""


class Reference:
    """The trace of a recorded run, for `Agreement`. Only the replica of rank 0 needs it.

    Steps that it has not recorded, and stages, are not compared.

    Raises UsageError if there is no trace, or one whose digests are of another algorithm than this run's.

    Args:
        path: of the run folder, or of the trace itself.
        algorithm: of this run's digests.

    Attributes:
        trace: as read through.
        num_compared: how many checked steps and evaluations have been compared so far, and were the same.
        only_samples: whether nothing of any replica's state was among what was compared.
    """

    def __init__(self, path: Path, algorithm: str = ALGORITHM) -> None:
        self.trace = Trace(path)
        self._name = str(path)
        if self.trace.algorithm != algorithm:
            raise UsageError(
                f"{str(self.trace.path)!r} has digests of algorithm {self.trace.algorithm!r}, and this run's are of "
                f"{algorithm!r}: they would differ whatever the runs did. Record it again with this release, on the "
                "same kind of device."
            )
        self.trace.read_through()
        self.num_compared = 0
        self.only_samples = True
        self._lines = self.trace.lines()
        self._line = next(self._lines, None)
        self._has_begun = False

    def compare(self, step: int, is_evaluation: bool, stages: Mapping[str, Stage]) -> Apart | None:
        """Where this run's `stages` of a checked step differ from the recorded ones; None if they do not.

        Steps are asked for in order.
        """
        key = step, is_evaluation
        while self._line is not None and self._line.key <= key:
            line, self._line = self._line, next(self._lines, None)
            if line.key == key:
                recorded = self.trace.digests(line)
                own = {name: stage.digest.hex() for name, stage in stages.items()}
                differing_stages = part_at(own, recorded)
                if differing_stages:
                    place = place_of(key, differing_stages, stages, self.trace.tensors(line))
                    return Apart(self._name, place, recorded, is_first=not self._has_begun)
                self.num_compared += bool(own.keys() & recorded.keys())
                self.only_samples = self.only_samples and own.keys() & recorded.keys() <= set(INDEPENDENT_STAGES)
                self._has_begun = step > 0
        return None


class ReferenceDiffers(Divergence):
    """Replicas agree, and what they have is not what the reference has recorded; `apart` says what that is."""

    def __init__(self, verdict: Verdict, apart: Apart) -> None:
        super().__init__(verdict)
        self.args = verdict, apart  # that unpickling calls it with again
        self.apart = apart


def describe_apart(apart: Apart, epoch: int | None, num_replicas: int) -> Verdict:
    """The verdict as far as the comparison alone can tell: where."""
    place = apart.place
    assert place.stage is not None
    evidence = [f"differing stages: {', '.join(place.differing_stages)}"]
    if place.num_entries:
        evidence.insert(0, f"{place.num_differing} of {place.num_entries} entries of {place.stage} differ")
        sides = ("here", "in the reference")
        evidence += [f"{name} is only {sides[ids[0]]}" for name, ids in list(place.only_on.items())[:5]]
    else:
        evidence.append("the reference has not recorded which tensor it is: record it with --agreement.record tensors")
    return Verdict(
        agreed=False,
        cause="unexplained",
        summary=f"parted from the reference {apart.reference} {place.when}: {place.where}",
        step=place.step,
        epoch=epoch,
        stage=place.stage,
        tensor=place.tensor,
        module=module_of(place.stage, place.tensor),
        phase=place.phase,
        classes=[list(range(num_replicas))],
        evidence=evidence,
    )
