"""TensorBoard and Weights & Biases, with the real packages, offline."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from dreplica.report.record.run_report import RunReport

from dreplica.config.schema import ReportConfig
from dreplica.errors import UsageError
from dreplica.report.record import trackers as sinks
from dreplica.report.record.trackers import Sinks, check_sinks
from dreplica.state.rng import get_rng_state
from tests.fixtures import SMALL
from tests.harness import run_job
from tests.report.record.test_run_report import done

pytestmark = pytest.mark.xdist_group("report")


def test_results_of_every_replica_reach_both_and_nothing_is_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_run_that_goes_on_and_then_parts_writes_each_epoch_once_and_both_verdicts(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = (*SMALL, "--report={tensorboard: true}", "--inject=[{replica: 1, step: 11, target: weights}]")
    run_job(*arguments, "--run.stop_after=7", root=tmp_path)
    job = run_job(*arguments, "--train.epochs=3", root=tmp_path)
    assert job.exitcodes == {0: 3, 1: 3}, job.output
    events = accumulators.EventAccumulator(str(job.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss/replica_1")] == [5, 10]
    stopped, parted = (event.tensor_proto.string_val[0] for event in events.Tensors("verdict/text_summary"))
    assert b"stopped on request after step 7" in stopped
    assert b"transient-fault: replicas parted at step 11" in parted


@pytest.mark.parametrize("key", ["tensorboard", "wandb"])
def test_a_package_that_is_not_installed_is_named(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"report.{key}: .* pip install {key}"):
        check_sinks(ReportConfig(**{key: True}))
    check_sinks(ReportConfig())


class Restless:
    """A sink that draws from every generator; `fails`: and then raises."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.calls: list[str] = []

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._called("scalars")

    def close(self, verdict: Mapping[str, Any]) -> None:
        self._called("close")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        random.random(), numpy.random.rand(), torch.rand(1)
        if self.fails:
            raise ConnectionError("nobody answers")


def generators() -> tuple[str, str, bytes]:
    state = get_rng_state()
    return repr(state["python"]), repr(state["numpy"]), state["torch"].numpy().tobytes()


@pytest.mark.parametrize("fails", [False, True])
def test_a_sink_moves_no_generator_and_ends_no_run(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Restless(fails)
    monkeypatch.setattr(sinks, "_TensorBoard", lambda folder: sink)
    opened = Sinks(ReportConfig(tensorboard=True), tmp_path, "run", {})
    before = generators()
    opened.epoch(done(1))
    opened.close(RunReport("run", tmp_path, "identical", []))
    assert generators() == before
    assert sink.calls == (["scalars"] if fails else ["scalars", "close"])
    assert ("nobody answers" in caplog.text) == fails
