"""TensorBoard and Weights & Biases, with the real packages, offline."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.config.schema import ReportConfig
from dreplica.errors import UsageError
from dreplica.report.record import trackers
from dreplica.report.record.trackers import Trackers, check_trackers
from dreplica.state.rng import get_rng_state
from tests.fixtures import SMALL
from tests.harness import run_job
from tests.report.record.test_metrics import done

pytestmark = pytest.mark.xdist_group("report")


def test_trackers_get_all_results_and_keep_trace_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = run_job(*SMALL, "--seed.model=distinct", "--report={tensorboard: true, wandb: true}", root=tmp_path / "both")
    assert job.exitcodes == {}, job.output
    assert job.trace == run_job(*SMALL, "--seed.model=distinct", root=tmp_path / "neither").trace

    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    events = accumulators.EventAccumulator(str(job.folder / "tensorboard")).Reload()
    for part, key in (("train", "loss"), ("train", "accuracy"), ("val", "loss"), ("val", "accuracy")):
        for replica_id in (0, 1):
            found = [(event.step, event.value) for event in events.Scalars(f"{part}/{key}/replica_{replica_id}")]
            assert found == [(row["step"], numpy.float32(row[part][key][replica_id])) for row in rows]
    assert len(events.Scalars("images_per_second/replica_1")) == 2
    (verdict,) = events.Tensors("verdict/text_summary")
    assert b"same samples in the same order" in verdict.tensor_proto.string_val[0]

    (record,) = (job.folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for name in (b"val/accuracy/replica_1", b"images_per_second/replica_0", b"verdict/cause"):
        assert name in content


def test_resumed_run_writes_each_epoch_once_and_both_verdicts(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = (*SMALL, "--report={tensorboard: true}", "--inject=[{replica: 1, step: 11, target: weights}]")
    run_job(*arguments, "--run.stop_after=7", root=tmp_path)
    job = run_job(*arguments, "--train.epochs=3", root=tmp_path)
    assert job.exitcodes == {0: 3, 1: 3}, job.output
    events = accumulators.EventAccumulator(str(job.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss/replica_1")] == [5, 10]
    stopped, diverged = (event.tensor_proto.string_val[0] for event in events.Tensors("verdict/text_summary"))
    assert b"stopped on request after step 7" in stopped
    assert b"transient-fault: replicas diverged at step 11" in diverged


@pytest.mark.parametrize("key", ["tensorboard", "wandb"])
def test_missing_package_is_named(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"report.{key}: .* pip install {key}"):
        check_trackers(ReportConfig(**{key: True}))
    check_trackers(ReportConfig())


class RandomTracker:
    """A tracker that draws from every generator, and raises if `fails`."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.calls: list[str] = []

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._called("scalars")

    def close(self, verdict: Verdict | None) -> None:
        self._called("close")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        random.random(), numpy.random.rand(), torch.rand(1)
        if self.fails:
            raise ConnectionError("no response")


def generators() -> tuple[str, str, bytes]:
    state = get_rng_state()
    return repr(state["python"]), repr(state["numpy"]), state["torch"].numpy().tobytes()


@pytest.mark.parametrize("fails", [False, True])
def test_tracker_keeps_generators_and_run_if_it_fails(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = RandomTracker(fails)
    monkeypatch.setattr(trackers, "_TensorBoard", lambda folder: tracker)
    opened = Trackers(ReportConfig(tensorboard=True), tmp_path, "run", {})
    before = generators()
    opened.epoch(done(1))
    opened.close(Verdict(True, "none", "agreed"))
    assert generators() == before
    assert tracker.calls == (["scalars"] if fails else ["scalars", "close"])
    assert ("no response" in caplog.text) == fails
