"""Comparison of the original step with its replay, on the replica whose original is not reproduced."""

from collections.abc import Mapping, Sequence

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.memory_corruption import FEW_BITS, MOST_FLIPPED_BITS, flipped_bits
from dreplica.diagnosis.measurement.full_tensors import compare
from dreplica.diagnosis.replay.replay_run import Replayed, Replayer
from dreplica.state.stages import STAGES, Stage

_MAX_CORRUPTED_TENSORS = 2
"""Number of tensors of a stage that one memory fault can reach: one, or two that are adjacent."""
_REACHED_DIRECTLY = {"optimizer", "weights"}
"""Stages in which a fault is visible directly. In earlier ones, a forward or backward pass has spread it."""


def compare_original(
    stage: str | None, original: Mapping[str, Stage], again: Replayed, replayer: Replayer, rank: int
) -> list[Finding]:
    """Compare this replica's original step with its replay, tensor by tensor, in the first stage that differs.

    Args:
        stage: The first stage in which the replicas had diverged.
        original: This replica's stages at the step, as compared.
        again: The replay.
        replayer: Has run the replay, and nothing since.
        rank: This replica.

    Returns:
        The findings. Empty if the replay gives the original result, or if the original tensor is gone.
    """
    differing = (name for name in STAGES if name in original and original[name].digest != again.stages[name].digest)
    if stage is None or next(differing, None) != stage:
        return []
    happened, replayed = original[stage].entries(), again.stages[stage].entries()
    moved = [name for name in happened if happened[name] != replayed.get(name)]
    findings = []
    if stage in _REACHED_DIRECTLY and len(moved) > _MAX_CORRUPTED_TENSORS:
        line = Evidence.of("many-tensors-changed", replica=rank, count=len(moved), stage=stage)
        findings.append(Finding(Kind.MANY_TENSORS, [line], [rank]))
    if stage == "rng":
        return [*findings, *_compare_generators(moved, replayer.original_generator, again.generator, rank)]
    pair = replayer.present_and_replayed(stage, moved[0]) if moved else None
    if pair is None:
        line = Evidence.of("original-tensor-gone", replica=rank, stage=stage)
        return [*findings, Finding(Kind.ORIGINAL_GONE, [line], [rank])]
    difference = compare(*pair)
    if difference is None:  # the rest of the entries of this stage differ
        return findings
    line = Evidence.of("replica-elements-differ", replica=rank, tensor=moved[0], stage=stage, difference=difference)
    if isinstance(difference, str):
        other = Evidence.of("replica-other-tensor", replica=rank)
        return [*findings, Finding(Kind.MANY_BITS, [line, other], [rank])]
    if stage in _REACHED_DIRECTLY and difference.differing_bits > MOST_FLIPPED_BITS:
        many = Evidence.of("many-bits-changed", replica=rank, bits=difference.differing_bits)
        return [*findings, Finding(Kind.MANY_BITS, [line, many], [rank])]
    few = len(moved) == 1 and difference.differing_bits <= FEW_BITS
    return [*findings, Finding(Kind.FEW_BITS if few else Kind.SPREAD, [line], [rank])]


def _compare_generators(moved: Sequence[str], original: bytes, again: bytes, rank: int) -> list[Finding]:
    """Compare the original state of torch's generator with the replayed one."""
    if not original:
        return [Finding(Kind.ORIGINAL_GONE, [Evidence.of("original-tensor-gone", replica=rank, stage="rng")], [rank])]
    bits = flipped_bits(original, again)
    if len(moved) == 1 and 0 < bits <= FEW_BITS:
        return [Finding(Kind.FEW_BITS, [Evidence.of("generator-bits-differ", replica=rank, bits=bits)], [rank])]
    if original != again and not bits:
        return [Finding(Kind.MANY_BITS, [Evidence.of("generator-drawn-differently", replica=rank)], [rank])]
    return []
