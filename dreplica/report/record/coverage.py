"""Describe what a run compared, and what it did not."""

from collections.abc import Collection

from dreplica.agreement.trace.report_records import Coverage, NotCompared, ReferenceCoverage
from dreplica.state.fingerprint.stage import INDEPENDENT_STAGES, STAGES


def describe_coverage(
    num_replicas: int,
    expect: str,
    every: int,
    steps_compared: int,
    reference: ReferenceCoverage | None = None,
    stages_seen: Collection[str] | None = None,
) -> Coverage:
    """Return what a run of the trainer compared.

    Args:
        num_replicas: Number of replicas.
        expect: `identical` or `independent`, as in `agreement.expect`.
        every: Interval of comparisons in steps, as in `agreement.every`.
        steps_compared: Number of steps compared between replicas.
        reference: Comparison with a recorded run, if there was one.
        stages_seen: Stages compared at least once, or None if that is not known.
    """
    stages = list(STAGES if expect == "identical" else INDEPENDENT_STAGES)
    missing: list[NotCompared] = []
    if num_replicas == 1:
        missing.append(NotCompared(code="one-replica", text="there is one replica: no state has a second copy"))
    if every == 0:
        rest = "only the final state is" if expect == "identical" else "nothing is"
        missing.append(NotCompared(code="every-0", text=f"agreement.every is 0: steps are not compared, {rest}"))
    elif every > 1:
        text = f"agreement.every is {every}: the steps between comparisons are not compared"
        missing.append(NotCompared(code="every", text=text))
    if expect == "independent":
        others = ", ".join(stage for stage in STAGES if stage not in INDEPENDENT_STAGES)
        text = f"agreement.expect is independent: {others} may differ"
        missing.append(NotCompared(code="independent", text=text))
    if num_replicas == 1 or (every == 0 and expect == "independent"):
        stages = []
    elif every == 0:
        stages = ["buffers", "optimizer", "weights", "rng"]
    if stages_seen is not None and (absent := [stage for stage in stages if stage not in stages_seen]):
        stages = [stage for stage in stages if stage in stages_seen]
        text = f"not reached, or empty: {', '.join(absent)}"
        missing.append(NotCompared(code="not-seen", text=text))
    return Coverage(
        steps_compared=steps_compared if num_replicas > 1 else 0,
        ranks=num_replicas,
        every=every,
        stages=stages,
        reference=reference,
        not_compared=missing,
    )
