"""Runs recorded by custom loops, compared while they train."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import dreplica
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.trace.run_report import RunReport
from dreplica.distributed.process_group import World
from dreplica.errors import SharedUsageError, UsageError
from tests.agreement.own_loop import STEPS, record, train, train_on_rank
from tests.harness import run_replicas


def test_reference_of_an_equal_run_agrees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reference = record(tmp_path / "a")
    with caplog.at_level(logging.INFO, "dreplica"):
        verdict = train(reference=reference).finish()
    line = f"AGREED with {reference}, {STEPS} steps: batch, buffers, output, gradients, optimizer, weights, rng"
    assert (verdict.agreed, verdict.cause, verdict.summary) == (True, "none", line)
    assert line in caplog.messages


@pytest.mark.parametrize(
    ("mistake", "step", "stage", "tensor"),
    [("lr", 3, "optimizer", "group0.lr"), ("weights", 3, "buffers", "1.running_mean"), ("draw", 3, "rng", "python")],
)
def test_reference_raises_at_the_first_difference(
    mistake: str, step: int, stage: str, tensor: str, tmp_path: Path
) -> None:
    reference = record(tmp_path / "a")
    with pytest.raises(dreplica.Divergence) as caught:
        train(mistake, 1, reference=reference)
    verdict = caught.value.verdict
    assert (verdict.step, verdict.stage, verdict.tensor) == (step, stage, tensor)
    assert f"diverged from the reference {reference} at step {step}: {stage}, {tensor}" in str(caught.value)
    assert str(caught.value).endswith(f"explain: dreplica explain {stage}")


def test_reference_names_differences_of_the_environment(tmp_path: Path) -> None:
    reference = record(tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVIDIA_TF32_OVERRIDE", "1")
        with pytest.raises(dreplica.Divergence) as caught:
            train("lr", 1, reference=reference)
    rows = [item.data for item in caught.value.verdict.evidence if item.code == "reference-field-differs"]
    assert [row["field"] for row in rows] == ["variables.NVIDIA_TF32_OVERRIDE"]


def test_reference_without_common_steps_is_not_agreement(tmp_path: Path) -> None:
    reference = record(tmp_path / "a")
    verdict = train(reference=reference, stages=("indices",)).finish()
    assert not verdict.agreed
    assert verdict.summary.startswith("NOT COMPARED")
    assert f"{reference} has none of these steps and stages" in verdict.summary


def test_only_recorded_stages_of_a_reference_agree(tmp_path: Path) -> None:
    reference = record(tmp_path / "a", stages=("weights", "rng"))
    with train(reference=reference, record=tmp_path / "b") as agreement:
        line = f"AGREED with {reference}, {STEPS} steps: weights, rng; recorded in {tmp_path / 'b'}"
        assert agreement.finish().summary == line
    coverage = RunReport.read(tmp_path / "b").coverage
    assert coverage is not None
    assert coverage.stages == ["weights", "rng"]
    assert coverage.reference is not None
    assert coverage.reference.stages == ["weights", "rng"]


def test_ranks_say_what_a_reference_has_recorded(tmp_path: Path) -> None:
    reference = tmp_path / "a"
    run_replicas(train_on_rank, 1, None, {"record": str(reference), "stages": ("weights",)})  # as many threads as below
    verdicts = run_replicas(train_on_rank, 2, None, {"reference": str(reference)})
    line = f"AGREED 2 ranks and with {reference} (weights), {STEPS} steps: batch, buffers, output"
    assert all(verdict.summary.startswith(line) for verdict in verdicts)


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_several_evaluations_of_a_step_are_compared(value: float, tmp_path: Path) -> None:
    _evaluate_twice(1.0, record=tmp_path / "a")
    if value == 1.0:
        assert _evaluate_twice(value, reference=tmp_path / "a").agreed
        return
    with pytest.raises(dreplica.Divergence, match="in the evaluation after step 1: predictions, val"):
        _evaluate_twice(value, reference=tmp_path / "a")


def _evaluate_twice(value: float, **arguments: Any) -> dreplica.Verdict:
    torch.manual_seed(0)
    with dreplica.Agreement(torch.nn.Linear(2, 2), **arguments) as agreement:
        for _ in range(2):
            agreement.step()
            agreement.evaluation({"val": torch.full((2,), value)})
            agreement.evaluation({"test": torch.zeros(2)})
        return agreement.finish()


def test_record_and_reference_must_differ(tmp_path: Path) -> None:
    reference = record(tmp_path / "a")
    with pytest.raises(UsageError, match="same folder"):
        train(reference=reference, record=tmp_path / "b" / ".." / "a")


def test_missing_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        train(reference=tmp_path / "nowhere")
    assert caught.value.code == "trace-missing"


def test_reference_of_a_resumed_run_ignores_unused_generators(tmp_path: Path) -> None:
    reference = record(tmp_path / "a", "draw", rank=1)  # draws from Python's generator at step 3, and never again
    verdict = train("draw", 1, steps_done=3, reference=reference).finish()
    assert verdict.summary.startswith(f"AGREED with {reference}, 2 steps: batch")


def test_ranks_record_and_agree_with_a_reference(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    run_replicas(train_on_rank, 1, None, {"record": str(one)})  # with as many threads as the ranks below
    verdicts = run_replicas(train_on_rank, 2, None, {"record": str(other), "reference": str(one)})
    assert verdicts[0] == verdicts[1]
    assert verdicts[0].summary.startswith(f"AGREED 2 ranks and with {one}, {STEPS} steps: batch, buffers")
    assert verdicts[0].summary.endswith(f"; recorded in {other}")
    assert [line.digests for line in Trace(other).lines()] == [line.digests for line in Trace(one).lines()]


def test_ranks_raise_an_error_of_rank_0_together(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    errors = run_replicas(train_on_rank, 2, None, {"record": str(tmp_path / "file")})
    assert [(type(error), error.code) for error in errors] == [(SharedUsageError, "cannot-record")] * 2


def test_ranks_with_different_folders_are_refused(tmp_path: Path) -> None:
    errors = run_replicas(_record_by_rank, 2, str(tmp_path))
    assert [error.code for error in errors] == ["settings-differ"] * 2
    assert errors[0].fields["argument"] == "record"
    assert not list(tmp_path.iterdir())


def _record_by_rank(world: World, folder: str) -> None:
    train(record=f"{folder}/{world.replica_id}")


def test_reference_says_that_the_run_resumed(tmp_path: Path) -> None:
    reference = record(tmp_path / "a")
    with pytest.raises(dreplica.Divergence) as caught:
        train("lr", 1, steps_done=1, reference=reference)
    assert "\n  evidence: this run resumed after step 1: what was not restored" in str(caught.value)


def test_reference_shows_no_arguments_that_name_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", str(tmp_path / "a")])
    reference = record(tmp_path / "a")
    monkeypatch.setattr("sys.argv", ["train.py", "--reference", str(reference), "--lr", "1"])
    with pytest.raises(dreplica.Divergence) as caught:
        train("lr", 1, reference=reference)
    rows = [item.data for item in caught.value.verdict.evidence if item.code == "reference-field-differs"]
    assert [(row["field"], row["there"], row["here"]) for row in rows] == [("argv", '""', '"--lr 1"')]
