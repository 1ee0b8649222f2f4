"""What a run compared, and what it did not."""

import pytest

from dreplica.agreement.coverage import describe_coverage
from dreplica.agreement.trace.report_records import ReferenceCoverage
from dreplica.state.fingerprint.stage import STAGES


@pytest.mark.parametrize(
    ("arguments", "stages", "codes", "has_second_copy"),
    [
        ((2, "identical", 1, 10), list(STAGES), [], True),
        ((2, "identical", 5, 2), list(STAGES), ["every"], True),
        ((2, "identical", 0, 0), ["buffers", "optimizer", "weights", "rng"], ["every-0"], True),
        ((3, "independent", 1, 10), ["indices", "batch"], ["independent"], True),
        ((3, "independent", 0, 0), [], ["every-0", "independent"], False),
        ((1, "identical", 1, 10), [], ["one-replica"], False),
    ],
)
def test_coverage_names_stages_and_reasons(
    arguments: tuple[int, str, int, int], stages: list[str], codes: list[str], has_second_copy: bool
) -> None:
    coverage = describe_coverage(*arguments)
    assert (coverage.stages, [item.code for item in coverage.not_compared]) == (stages, codes)
    assert coverage.has_second_copy == has_second_copy
    assert coverage.steps_compared == (arguments[3] if arguments[0] > 1 else 0)


def test_coverage_counts_a_reference_as_second_copy() -> None:
    for steps in (0, 10):
        reference = ReferenceCoverage(run="runs/a", steps=steps)
        assert describe_coverage(1, "identical", 1, 10, reference).has_second_copy == bool(steps)


def test_coverage_names_stages_that_were_not_reached() -> None:
    coverage = describe_coverage(2, "identical", 1, 1, None, {"indices", "batch", "weights", "rng"})
    assert coverage.stages == ["indices", "batch", "weights", "rng"]
    (missing,) = coverage.not_compared
    assert missing.code == "not-seen"
    assert missing.text == "not reached, or empty: buffers, output, gradients, optimizer, predictions"
