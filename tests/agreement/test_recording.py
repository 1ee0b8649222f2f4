"""A run folder recorded from a custom loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dreplica
from dreplica.agreement.trace.reader import Trace
from dreplica.agreement.trace.run_report import RunReport
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from tests.agreement.own_loop import STEPS, record, train
from tests.harness import run_replicas


def test_record_writes_a_run_folder(tmp_path: Path) -> None:
    folder = record(tmp_path / "runs" / "a")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "manifest.json",
        "report.json",
        "tensors.bin",
        "trace.jsonl",
    ]
    assert [line.key for line in Trace(folder).lines()] == [(step, False) for step in range(STEPS + 1)]
    (manifest,) = json.loads((folder / "manifest.json").read_text())
    assert manifest["replica"] == 0
    assert manifest["distributions"]["torch"]
    report = RunReport.read(folder)
    assert report.coverage is not None
    assert not report.coverage.has_second_copy
    assert report.verdict is not None
    assert (report.verdict.cause, report.verdict.agreed) == ("none", False)
    assert report.verdict.summary.startswith(f"RECORDED {STEPS} steps in {folder}: batch, buffers")
    assert (report.run.last_step, report.steps_checked) == (STEPS, STEPS)
    assert report.fingerprints[0].digests.keys() == {"weights", "buffers", "optimizer"}


def test_record_gives_equal_bytes_for_equal_runs(tmp_path: Path) -> None:
    one, other = record(tmp_path / "a"), record(tmp_path / "b")
    for name in ("trace.jsonl", "tensors.bin"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("name", ["trace.jsonl", "report.json", "manifest.json", "tensors.bin"])
def test_record_never_overwrites_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="already holds a recorded run") as caught:
        train(record=tmp_path)
    assert caught.value.code == "already-recorded"
    assert (tmp_path / name).read_text() == "mine"


def test_record_accepts_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("mine")
    record(tmp_path)
    assert (tmp_path / "model.pt").read_text() == "mine"


def test_record_continues_an_interrupted_run(tmp_path: Path) -> None:
    whole, folder = record(tmp_path / "whole"), tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        _interrupt(folder)
    assert (folder / "trace.jsonl").read_bytes() != (whole / "trace.jsonl").read_bytes()
    record(folder, steps_done=2)  # repeats step 3, which it had recorded
    assert (folder / "trace.jsonl").read_bytes() == (whole / "trace.jsonl").read_bytes()
    assert RunReport.read(folder).run.resumed_from == 2


@pytest.mark.parametrize("mistake", [None, "lr"])
def test_resumed_run_warns_if_it_repeats_other_results(
    mistake: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupt(tmp_path / "a")
    with train(mistake, 1, record=tmp_path / "a", steps_done=2) as agreement:
        agreement.finish()
    warnings = [row.getMessage() for row in caplog.records if row.levelname == "WARNING"]
    assert RunReport.read(tmp_path / "a").warnings == warnings
    assert len(warnings) == (mistake is not None)
    for warning in warnings:
        assert warning.startswith(f"record: step 3, which '{tmp_path / 'a'}' had recorded before the interruption, ")
        assert "differs now: optimizer." in warning


def test_resumed_run_warns_about_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupt(tmp_path / "a")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    folder = record(tmp_path / "a", steps_done=2)
    text = 'record: variables.NVIDIA_TF32_OVERRIDE was null before the interruption, and is "1" now'
    assert RunReport.read(folder).warnings == [text]


@pytest.mark.parametrize("folder", [None, "a"])
def test_closed_agreement_compares_nothing(folder: str | None, tmp_path: Path) -> None:
    agreement = train(record=folder and tmp_path / folder)
    agreement.close()
    agreement.close()
    for call in (agreement.step, agreement.finish, lambda: agreement.evaluation({"p": torch.ones(1)})):
        with pytest.raises(UsageError, match="this Agreement is closed") as caught:
            call()
        assert caught.value.code == "closed"
    assert agreement.steps_done == STEPS


@pytest.mark.process
def test_record_refuses_a_folder_in_use(tmp_path: Path) -> None:
    code = (
        f"from tests.agreement.own_loop import train; agreement = train(record={str(tmp_path / 'a')!r}); "
        "print('trained', flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "trained\n"
        before = (tmp_path / "a" / "trace.jsonl").read_bytes()
        with pytest.raises(UsageError, match="is in use: another process records into it") as caught:
            train(record=tmp_path / "a", steps_done=2)
        assert caught.value.code == "record-in-use"
        process.kill()
    assert (tmp_path / "a" / "trace.jsonl").read_bytes() == before
    record(tmp_path / "a", steps_done=2)


def _interrupt(folder: Path) -> None:
    steps = 0
    original = dreplica.Agreement.step

    def step(self: dreplica.Agreement, **arguments: object) -> bool:
        nonlocal steps
        steps += 1
        result = original(self, **arguments)  # type: ignore[arg-type]
        if steps == 3:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreplica.Agreement, "step", step)
        train(record=folder)


@pytest.mark.parametrize("kind", ["a file", "below a file", "empty", "a number", "read-only"])
def test_record_refuses_unusable_paths(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    paths = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "runs",
        "empty": "",
        "a number": 3,
        "read-only": "/proc/runs/a",
    }
    with pytest.raises(UsageError, match="record") as caught:
        train(record=paths[kind])
    assert caught.value.fields["argument"] == "record"


def test_record_keeps_the_verdict_of_a_divergence(tmp_path: Path) -> None:
    reference = record(tmp_path / "a")
    with pytest.raises(dreplica.Divergence):
        train("lr", 1, record=tmp_path / "b", reference=reference)
    verdict = RunReport.read(tmp_path / "b").verdict
    assert verdict is not None
    assert (verdict.agreed, verdict.step, verdict.stage, verdict.tensor) == (False, 3, "optimizer", "group0.lr")


def test_record_keeps_the_loss_of_a_rank(tmp_path: Path) -> None:
    results = run_replicas(_lose_rank_1, 2, str(tmp_path / "a"), timeout=30.0)
    assert isinstance(results[0], dreplica.ReplicaLost)
    verdict = RunReport.read(tmp_path / "a").verdict
    assert verdict is not None
    assert (verdict.agreed, verdict.cause, verdict.suspects, verdict.step) == (False, "replica-lost", [1], 0)


def _lose_rank_1(world: World, folder: str) -> None:
    torch.manual_seed(0)
    agreement = dreplica.Agreement(torch.nn.Linear(2, 2), record=folder, timeout=10)
    if world.replica_id == 1:
        os._exit(9)
    agreement.step()
