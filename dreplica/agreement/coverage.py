"""Describe what a run compared, and what it did not."""

from collections.abc import Collection

from dreplica.agreement.trace.report_records import Coverage, NotCompared, ReferenceCoverage
from dreplica.state.fingerprint.stage import INDEPENDENT_STAGES, STAGES

_PERMANENT_STAGES = ("buffers", "optimizer", "weights", "rng")
"""Stages that exist at any time, and are compared at the end in any case."""


def describe_coverage(
    num_ranks: int,
    expect: str,
    every: int,
    steps_compared: int,
    reference: ReferenceCoverage | None = None,
    stages_seen: Collection[str] | None = None,
    planned: Collection[str] | None = None,
) -> Coverage:
    """Return what a run compared.

    Args:
        num_ranks: Number of ranks that were compared with each other.
        expect: What must agree: `identical`, `independent` or `ddp`.
        every: Interval of comparisons in steps, 0 for none.
        steps_compared: Number of steps compared between ranks.
        reference: Comparison with a recorded run, if there was one.
        stages_seen: Stages compared at least once, or None if that is not known.
        planned: Stages to compare, or None for those that `expect` implies.
    """
    if planned is None:
        planned = INDEPENDENT_STAGES if expect == "independent" else STAGES
    stages = [stage for stage in STAGES if stage in planned]
    missing: list[NotCompared] = []
    has_second_copy = num_ranks > 1 or bool(reference and reference.steps)
    if not has_second_copy:
        text = "there is one replica: no state has a second copy"
        missing.append(NotCompared(code="one-replica", text=text))
    if every == 0:
        rest = "nothing is" if expect == "independent" else "only the final state is"
        missing.append(NotCompared(code="every-0", text=f"every is 0: steps are not compared, {rest}"))
    elif every > 1:
        text = f"every is {every}: the steps between comparisons are not compared"
        missing.append(NotCompared(code="every", text=text))
    if len(stages) < len(STAGES):
        code = expect if expect in ("independent", "ddp") else "stages"
        others = ", ".join(stage for stage in STAGES if stage not in stages)
        reason = "stages leaves them out" if code == "stages" else f"expect is {expect}"
        text = f"{reason}: {others} may differ"
        missing.append(NotCompared(code=code, text=text))
    if not has_second_copy or (every == 0 and expect == "independent"):
        stages = []
    elif every == 0:
        stages = [stage for stage in stages if stage in _PERMANENT_STAGES]
    if num_ranks == 1 and reference is not None and reference.stages is not None and stages_seen is not None:
        stages_seen = set(stages_seen) & set(reference.stages)
    if stages_seen is not None and (absent := [stage for stage in stages if stage not in stages_seen]):
        stages = [stage for stage in stages if stage in stages_seen]
        where = "not reached, or empty" if num_ranks > 1 or reference is None else "not reached, empty, or not recorded"
        text = f"{where}: {', '.join(absent)}"
        missing.append(NotCompared(code="not-seen", text=text))
    return Coverage(
        steps_compared=steps_compared if num_ranks > 1 else 0,
        ranks=num_ranks,
        every=every,
        stages=stages,
        reference=reference,
        not_compared=missing,
    )
