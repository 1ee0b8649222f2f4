"""metrics.jsonl: one line per epoch."""

from pathlib import Path

from dreplica.report.record.metrics import append_metrics, losses_not_finite, read_metrics
from dreplica.state.progress import Position
from dreplica.training.events import EpochDone
from tests.agreement.trace.test_json_file import strictly


def done(epoch: int, **values: list[float]) -> EpochDone:
    part = {"accuracy": [0.5, 0.5], "loss": [1.0, 1.0]}
    val = {name: values.get(name, given) for name, given in part.items()}
    return EpochDone(
        epoch, 5 * epoch, part, val, seconds=1.0, images_per_second=80.0, evaluation=None, position=Position(9)
    )


def test_append_metrics_writes_nan_as_null(tmp_path: Path) -> None:
    append_metrics(tmp_path / "metrics.jsonl", done(1, loss=[float("nan"), 2.0]))
    assert strictly((tmp_path / "metrics.jsonl").read_text())["val"]["loss"] == [None, 2.0]


def test_read_metrics_truncates_after_last_valid_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2):
        append_metrics(path, done(epoch))
    valid = path.read_bytes()
    path.write_bytes(valid + b'{"epoch": 3, "tra')
    assert [item.epoch for item in read_metrics(path)] == [1, 2]
    assert path.read_bytes() == valid


def test_losses_not_finite_names_part_and_epoch() -> None:
    assert losses_not_finite(done(1)) is None
    warning = losses_not_finite(done(2, loss=[1.0, float("inf")]))
    assert warning == "epoch 2: validation loss [1.0, inf] is not finite. Replicas agree, but do not learn."
