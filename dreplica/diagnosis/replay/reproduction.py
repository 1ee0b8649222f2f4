"""Comparison of the replays of a custom step with the original step, whose digests the `Agreement` has kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dreplica.agreement.kept_state import Original
from dreplica.diagnosis.evidence.aftermath import Aftermath, Change, compare_tensors
from dreplica.diagnosis.evidence.finding import Finding
from dreplica.diagnosis.evidence.original_step import find_counters, find_size, find_skipped_step, find_traces
from dreplica.state.stages import STAGES, Stage


@dataclass(frozen=True)
class Reproduction:
    """One stage of a replay, compared with the same stage of the original step on the same replica."""

    original: bytes
    """Digest of the original stage."""
    reproduced: bool | None
    """True if the replay has the same digest. None if it is unknown what the replay would have to be compared with."""


def compare_with_original(
    original: Original, after: Mapping[str, Stage], returned: Sequence[Tensor]
) -> dict[str, Reproduction]:
    """Compare this replica's state after a replay with the original step.

    Args:
        original: The original step.
        after: The digests after the replay, as `Original.observe` returns them.
        returned: The tensors that the step function has returned in the replay.

    Returns:
        Stage to comparison, for the stages that were compared in the original step, except indices and batch.
    """
    rows: dict[str, Reproduction] = {}
    for name, stage in original.stages.items():
        if name == "output":
            rows[name] = Reproduction(stage.digest, _returns(original, stage, returned))
        elif name in after:
            rows[name] = Reproduction(stage.digest, stage.digest == after[name].digest)
    return rows


def examine(
    original: Original,
    after: Mapping[str, Stage],
    rows: Mapping[str, Reproduction],
    stage: str | None,
    sides: tuple[Aftermath, Aftermath, Aftermath],
    replica_id: int,
) -> list[Finding]:
    """Compare this replica's original step with a replay, tensor by tensor.

    Args:
        original: The original step.
        after: The digests after the replay, as `Original.observe` returns them.
        rows: The comparison of both by stages.
        stage: The first stage in which the replicas had diverged.
        sides: The state that the original step left, that the replay left, and the state before.
        replica_id: This replica.

    Returns:
        The findings: traces of code, also where the step is reproduced, since what replicas have in common does not
        divide them; and the size of the difference.
    """
    happened, replayed, before = sides
    traces = find_traces(happened, replayed, replica_id)
    differing = [name for name in STAGES if name in rows and rows[name].reproduced is False]
    if not differing:
        return traces
    if stage == "output" and rows[stage].reproduced is None:
        return traces  # the first stage that differs may be the output
    if differing[0] != stage:
        return []
    if stage not in after or stage == "rng":
        return traces
    there, here = original.stages[stage].entries(), after[stage].entries()
    names = [name for name in dict.fromkeys([*there, *here]) if there.get(name) != here.get(name)]
    moved = compare_tensors(happened.tensors.get(stage, {}), replayed.tensors.get(stage, {}))
    change = Change(stage, names, len(here), {name: each for name, each in moved.items() if name in names})
    proof = "everything else agrees" if len(differing) == 1 else None
    findings = [*traces, *find_counters(happened, replayed, replica_id)]
    findings += find_skipped_step(happened, replayed, before, replica_id)
    return findings + find_size(change, stage not in ("optimizer", "weights"), proof, replica_id)


def _returns(original: Original, output: Stage, returned: Sequence[Tensor]) -> bool | None:
    """Return True if the step function has returned every tensor of the original output, in any order.

    The output was given to `Agreement.step` under other names than the step function returns it. So an entry that is
    not found may differ, or may not be among what the function returns.
    """
    for name, digest in output.entries().items():
        if all(original.digest(name, tensor) != digest for tensor in returned):
            return None
    return True


def original_digests(
    replays: Sequence[Mapping[str, bytes]], rows: Sequence[Mapping[str, Reproduction]]
) -> list[dict[str, bytes]] | None:
    """Return the digests of the original steps, in terms of the replays' digests.

    The replays' digests are computed otherwise than those of the original step: gradients before the optimizer's step,
    outputs under other names. So an original stage that a replay reproduces gets the replay's digest. A stage that no
    replica reproduces is taken as reproduced: the loop changes it outside of the step function, as a scheduler does.

    Args:
        replays: Digests of each replica's replay, by stage.
        rows: Each replica's comparison with its original step.

    Returns:
        Digests of each replica's original step. None if no replica reproduces any stage.
    """
    merged = [dict(replay) for replay in replays]
    compared = False
    for stage in rows[0]:
        column = [row[stage] for row in rows]
        known = {
            each.original: replay[stage]
            for each, replay in zip(column, replays, strict=True)
            if each.reproduced and stage in replay
        }
        if not known:
            continue
        compared = True
        for each, digests in zip(column, merged, strict=True):
            if stage in digests:
                digests[stage] = known.get(each.original, each.original)
    return merged if compared else None
