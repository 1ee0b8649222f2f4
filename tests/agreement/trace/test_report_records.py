"""The records of report.json."""

import math

from dreplica.agreement.trace.report_records import Coverage, EpochRecord, ReferenceCoverage, group_values


def test_group_values_groups_equal_values_and_nan() -> None:
    groups = group_values([0.5, math.nan, 0.5, -0.0, 0.0, math.nan])
    assert [group.replicas for group in groups] == [[0, 2], [1, 5], [3], [4]]


def test_epoch_values_are_in_the_order_of_replicas() -> None:
    record = EpochRecord.of(1, {"loss": [3.0, 1.0, 3.0]}, {}, seconds=1.0)
    assert record.values("train", "loss") == [3.0, 1.0, 3.0]
    assert record.values("val", "loss") == []
    assert "seconds" not in record.model_dump()


def test_coverage_of_one_rank_has_no_second_copy() -> None:
    coverage = Coverage(steps_compared=0, ranks=1, every=1, stages=["weights"])
    assert not coverage.has_second_copy
    coverage.reference = ReferenceCoverage(run="runs/a", steps=3)
    assert coverage.has_second_copy
