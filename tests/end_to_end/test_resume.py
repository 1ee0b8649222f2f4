"""Whole jobs that are interrupted and go on: bit for bit as if they had not been."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreplica.agreement.trace.folder_lock import FolderLock
from dreplica.training.checkpoint.file_format import list_checkpoints
from tests.data.pictures import make_folder
from tests.end_to_end.test_bad_input import messages
from tests.end_to_end.test_image_folder import AUGMENTED, JOB
from tests.fixtures import SMALL
from tests.harness import REPOSITORY, Job, environment, run_job, torchrun_command
from tests.trace_rows import read_rows, write_rows

STOP = "--run.stop_after=7"
"""Of 10 steps, in the middle of the second epoch."""
CONFIGS = {
    "sgd with momentum": ("--optim={name: SGD, lr: 0.05, momentum: 0.9}", "--schedule={name: StepLR, step_size: 1}"),
    "adamw in bf16": ("--optim={name: AdamW, lr: 0.01}", "--train.amp=bf16", "--train.grad_clip=1"),
    "fp16 with a scaler": ("--train.amp=fp16",),
    "nothing compared": ("--agreement.every=0",),
    "compared now and then": ("--agreement.every=3",),
    "random data order": ("--seed.data=null",),
    "independent": ("--seed.model=distinct",),
}


def facts(job: Job) -> dict[str, Any]:
    """Return what two runs with equal results have in common."""
    report = job.report
    metrics = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "trace": job.trace,
        "verdict": report["verdict"],
        "steps_checked": report["steps_checked"],
        "epochs": report["epochs"],
        "fingerprints": report["fingerprints"],
        "metrics": [{key: row[key] for key in ("step", "epoch", "train", "val")} for row in metrics],
    }


@pytest.mark.parametrize("arguments", CONFIGS.values(), ids=CONFIGS.keys())
def test_resumed_run_equals_uninterrupted(arguments: tuple[str, ...], tmp_path: Path) -> None:
    job = [*SMALL, *arguments]
    stopped = run_job(*job, STOP, root=tmp_path)
    assert stopped.exitcodes == {0: 4, 1: 4}, stopped.output
    assert stopped.report["run"]["stopped_after"] == 7
    resumed = run_job(*job, root=tmp_path)
    assert resumed.returncode == 0, resumed.output
    assert resumed.folder == stopped.folder
    assert [path.name for path in tmp_path.iterdir()] == ["job"]
    assert resumed.report["run"]["resumed_from"] == 7
    if "--seed.data=null" in arguments:
        digests = [row["digests"] for row in resumed.trace_rows]
        assert len({row["indices"] for row in digests if "indices" in row}) == 10
        return
    expected = run_job(*job)
    if any(argument.startswith("--agreement.every") for argument in arguments):
        # Before a checkpoint the state is compared in any case, which is a line, and a step checked, more.
        assert [row for row in resumed.trace_rows if row in expected.trace_rows] == expected.trace_rows
        assert resumed.report["fingerprints"] == expected.report["fingerprints"]
        assert resumed.report["epochs"] == expected.report["epochs"]
        return
    assert facts(resumed) == facts(expected)


@pytest.mark.parametrize(("every", "number"), [(1, "SIGTERM"), (100, "SIGUSR2"), (0, "SIGINT")])
def test_stop_request_stops_all_at_same_step(
    every: int, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However seldom states are compared."""
    monkeypatch.setenv("STOP_SIGNAL", number)
    factory = "--model.factory=tests.end_to_end.interrupted:ToldToStop"
    stopped = run_job(*SMALL, factory, f"--agreement.every={every}", root=tmp_path)
    assert stopped.exitcodes == {0: 4, 1: 4}, stopped.output
    assert stopped.report["run"]["stopped_after"] == 4
    assert [path.name for path in list_checkpoints(stopped.folder / "checkpoints")] == ["step_000004"]


def test_resume_with_workers_augmentation_and_weights(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    job = [*JOB, *AUGMENTED, f"--data.root={root}", "--data.num_workers=2"]
    stopped = run_job(*job, "--run.stop_after=6", root=tmp_path / "runs")
    assert stopped.exitcodes == {0: 4, 1: 4}, stopped.output
    resumed = run_job(*job[:-1], "--data.num_workers=1", root=tmp_path / "runs")
    assert resumed.report["run"]["resumed_from"] == 6
    assert facts(resumed) == facts(run_job(*job))


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_resume_with_any_number_of_replicas(num_replicas: int, tmp_path: Path) -> None:
    assert run_job(*SMALL, STOP, root=tmp_path).exitcodes == {0: 4, 1: 4}
    resumed = run_job(*SMALL, root=tmp_path, num_replicas=num_replicas)
    assert resumed.returncode == 0, resumed.output
    assert resumed.report["run"]["resumed_from"] == 7
    assert resumed.trace == run_job(*SMALL).trace
    assert len(resumed.report["fingerprints"]) == num_replicas


def test_independent_replicas_resume_in_same_number(tmp_path: Path) -> None:
    run_job(*SMALL, "--seed.model=distinct", STOP, root=tmp_path)
    resumed = run_job(*SMALL, "--seed.model=distinct", root=tmp_path, num_replicas=3)
    assert resumed.exitcodes == {0: 2, 1: 2, 2: 2}
    assert "(replica 2)" in resumed.output
    (message,) = messages(resumed.output)
    assert message.startswith("error: run.resume: no checkpoint in ")


@pytest.mark.cluster
def test_torchrun_restart_leaves_no_gap_in_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first checkpoint, and then between two."""
    factory = "--model.factory=tests.end_to_end.interrupted:Killed"
    job = [*SMALL, factory, "--checkpoint.every_steps=3", "--checkpoint.keep=1"]
    expected = run_job(*job)
    marks = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setenv("KILL", f"0:2:{marks[0]} 1:8:{marks[1]}")
    command = torchrun_command(*job, root=tmp_path)
    command.insert(command.index("--standalone"), "--max-restarts=2")
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=REPOSITORY, env=environment(), check=False
    )
    resumed = Job(process.returncode, {}, process.stdout, process.stderr, tmp_path / "job")
    assert process.returncode == 0, resumed.output
    assert [mark.exists() for mark in marks] == [True, True]
    assert facts(resumed) == facts(expected)


def flip_one_bit(place: Path) -> None:
    content = bytearray((place / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (place / "model.safetensors").write_bytes(content)


def leave_half(place: Path) -> None:
    (place / "state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (flip_one_bit, "damaged", "model.safetensors does not match its digest"),
        (leave_half, "file-missing", "state.json is missing"),
    ],
)
def test_damaged_checkpoint_is_skipped(damage: Callable[[Path], None], code: str, words: str, tmp_path: Path) -> None:
    stopped = run_job(*SMALL, STOP, root=tmp_path)
    newest, before = list_checkpoints(stopped.folder / "checkpoints")
    damage(newest)
    resumed = run_job(*SMALL, root=tmp_path)
    assert f"run.resume: skipped {newest.name}: {words} (replica 0)\n" in resumed.output
    assert f"skipped checkpoint {newest.name}: {words} (replica 0)" in resumed.report["warnings"]
    (skipped,) = resumed.report["run"]["skipped_checkpoints"]
    assert skipped == {"name": newest.name, "replica": 0, "code": code, "reason": words}
    assert resumed.report["run"]["resumed_from"] == 5
    assert before.name == "step_000005"
    assert facts(resumed) == facts(run_job(*SMALL))


def test_resume_without_valid_checkpoint_is_error(tmp_path: Path) -> None:
    stopped = run_job(*SMALL, STOP, root=tmp_path)
    for place in list_checkpoints(stopped.folder / "checkpoints"):
        flip_one_bit(place)
    before = stopped.trace
    resumed = run_job(*SMALL, root=tmp_path)
    assert resumed.exitcodes == {0: 2, 1: 2}
    (message,) = messages(resumed.output)
    assert message.endswith("Start over with --run.resume never.")
    assert stopped.trace == before
    assert len(list_checkpoints(stopped.folder / "checkpoints")) == 2
    anew = run_job(*SMALL, "--run.resume=never", root=tmp_path)
    assert anew.returncode == 0
    assert (tmp_path / "job-2" / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--optim.lr=0.2",), "its config differs: optim.lr was "),
        (("--inject=[{replica: 0, step: 9, target: weights}]",), "its config differs: inject"),
    ],
)
def test_resume_with_other_config_starts_new_run(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    stopped = run_job(*SMALL, STOP, root=tmp_path)
    before = stopped.trace
    job = run_job(*SMALL, *arguments, root=tmp_path)
    assert words in job.output
    assert stopped.trace == before
    assert len((tmp_path / "job-2" / "trace.jsonl").read_text().splitlines()) > 8


def test_finished_run_is_not_resumed(tmp_path: Path) -> None:
    first = run_job(*SMALL, root=tmp_path)
    before = first.trace
    second = run_job(*SMALL, root=tmp_path)
    assert second.returncode == 0
    assert "resume" not in second.output
    assert first.trace == before == (tmp_path / "job-2" / "trace.jsonl").read_text().splitlines()


def test_folder_of_running_job_is_not_resumed(tmp_path: Path) -> None:
    stopped = run_job(*SMALL, STOP, root=tmp_path)
    before = stopped.trace
    lock = FolderLock(stopped.folder)
    assert not lock.taken
    job = run_job(*SMALL, root=tmp_path)
    lock.release()
    assert "another run writes to it" in job.output
    assert stopped.trace == before
    assert (tmp_path / "job-2" / "report.json").exists()


def test_resumed_steps_are_checked_against_trace(tmp_path: Path) -> None:
    stopped = run_job(*SMALL, STOP, root=tmp_path)
    newest, _ = list_checkpoints(stopped.folder / "checkpoints")
    shutil.rmtree(newest)
    rows = read_rows(stopped.folder)
    assert rows[-1]["step"] == 7
    rows[-1]["digests"]["weights"] = "0" * 32
    write_rows(stopped.folder, rows)
    resumed = run_job(*SMALL, root=tmp_path)
    verdict = resumed.report["verdict"]
    assert resumed.exitcodes == {0: 3, 1: 3}
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("unexplained", 7, "weights")


@pytest.mark.parametrize(("name", "place"), [("trace.jsonl", "line 3"), ("tensors.bin", "byte 33")])
def test_damaged_record_is_refused(name: str, place: str, tmp_path: Path) -> None:
    stopped = run_job(*SMALL, STOP, "--agreement.record=tensors", root=tmp_path)
    path = stopped.folder / name
    content = bytearray(path.read_bytes())
    at = content.index(b"\n[1,") + 30 if name == "trace.jsonl" else content.index(b"\n") + 5
    content[at] ^= 1
    path.write_bytes(content)
    checkpoints = list_checkpoints(stopped.folder / "checkpoints")
    resumed = run_job(*SMALL, "--agreement.record=tensors", root=tmp_path)
    assert resumed.exitcodes == {0: 2, 1: 2}, resumed.output
    assert f"{name}' is damaged at {place}" in resumed.output
    assert path.read_bytes() == content
    assert list_checkpoints(stopped.folder / "checkpoints") == checkpoints


def test_truncated_lines_are_rewritten(tmp_path: Path) -> None:
    stopped = run_job(*SMALL, STOP, root=tmp_path)
    newest, _ = list_checkpoints(stopped.folder / "checkpoints")
    shutil.rmtree(newest)
    (stopped.folder / "report.json").unlink()
    for name in ("trace.jsonl", "metrics.jsonl"):
        with (stopped.folder / name).open("a") as file:
            file.write('[8,1,0,255,"ep')
    resumed = run_job(*SMALL, root=tmp_path)
    assert facts(resumed) == facts(run_job(*SMALL))


def test_failed_checkpoints_are_warnings(tmp_path: Path) -> None:
    stopped = run_job(*SMALL, "--run.stop_after=2", root=tmp_path)
    shutil.rmtree(stopped.folder / "checkpoints")
    (stopped.folder / "checkpoints").write_text("in the way")
    job = run_job(*SMALL, root=tmp_path)
    assert job.returncode == 0, job.output
    warnings = [line for line in job.report["warnings"] if "cannot write the checkpoint" in line]
    steps = [line.split(":")[0] for line in warnings]
    assert steps == ["cannot write the checkpoint at step 5", "cannot write the checkpoint at step 10"]
    assert (stopped.folder / "checkpoints").read_text() == "in the way"
    again = run_job(*SMALL, "--run.stop_after=2", "--run.name=other", root=tmp_path)
    assert again.exitcodes == {0: 4, 1: 4}


def test_attempt_without_steps_keeps_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = (*SMALL, "--model.factory=tests.end_to_end.interrupted:other_threads")
    stopped = run_job(*job, STOP, root=tmp_path)
    before = stopped.report
    monkeypatch.setenv("OTHER_THREADS", "1")
    attempt = run_job(*job, root=tmp_path)
    assert attempt.exitcodes == {0: 3, 1: 3}, attempt.output
    assert stopped.report == before
    verdict = json.loads((tmp_path / "job-2" / "report.json").read_text())["verdict"]
    assert verdict["cause"] == "environment-differs"
    shutil.rmtree(tmp_path / "job-2")
    monkeypatch.delenv("OTHER_THREADS")
    assert run_job(*job, root=tmp_path).report["run"]["resumed_from"] == 7


def test_recurring_divergence_is_not_resumed(tmp_path: Path) -> None:
    job = (*SMALL, "--overrides={1: {optim: {lr: 0.02}}}", "--checkpoint.every_steps=1")
    assert run_job(*job, root=tmp_path).exitcodes == {0: 3, 1: 3}
    again = run_job(*job, root=tmp_path)
    assert "it ended with the cause declared-override" in again.output
    assert (tmp_path / "job-2" / "report.json").exists()


def test_stop_needs_its_own_checkpoint(tmp_path: Path) -> None:
    factory = "--model.factory=tests.end_to_end.interrupted:full_once"
    stopped = run_job(*SMALL, factory, STOP, "--checkpoint.every_steps=3", root=tmp_path)
    assert stopped.exitcodes == {0: 4, 1: 4}, stopped.output
    newest, *_ = list_checkpoints(stopped.folder / "checkpoints")
    assert newest.name == "step_000007"
    (warning,) = stopped.report["warnings"]
    assert warning.startswith("cannot write the checkpoint at step 3: OSError: ")


def test_good_checkpoint_is_kept_until_newer_one(tmp_path: Path) -> None:
    """Though one is kept, a newer one lies there, which is damaged, and the next cannot be written."""
    job = (*SMALL, "--model.factory=tests.end_to_end.interrupted:full_once", "--checkpoint.every_steps=2")
    stopped = run_job(*job, STOP, root=tmp_path)
    newest, before, *_ = list_checkpoints(stopped.folder / "checkpoints")
    flip_one_bit(newest)
    failed = run_job(*job, "--run.stop_after=8", "--checkpoint.keep=1", root=tmp_path)
    assert failed.exitcodes == {0: 1, 1: 1}, failed.output
    assert before.is_dir()
    assert before.name == "step_000006"
    expected = run_job(*job, root=tmp_path / "reference")
    assert facts(run_job(*job, "--checkpoint.keep=1", root=tmp_path)) == facts(expected)
    assert [path.name for path in list_checkpoints(stopped.folder / "checkpoints")] == ["step_000010"]


def test_independent_replicas_keep_newest_common_checkpoint(tmp_path: Path) -> None:
    factory = "--model.factory=tests.end_to_end.interrupted:full_on_replica_1"
    job = (*SMALL, factory, "--seed.model=distinct", "--checkpoint.every_steps=2", "--checkpoint.keep=1")
    failed = run_job(*job, STOP, root=tmp_path)
    assert failed.exitcodes == {0: 1, 1: 1}, failed.output
    resumed = run_job(*job, root=tmp_path)
    assert resumed.report["run"]["resumed_from"] == 2, resumed.output


def test_trace_with_lost_lines_is_warning(tmp_path: Path) -> None:
    stopped = run_job(*SMALL, STOP, root=tmp_path)
    before = stopped.trace
    (stopped.folder / "trace.jsonl").write_text("\n".join(before[:5]) + "\n")
    (stopped.folder / "metrics.jsonl").write_bytes(b"\0" * 9 + b"\n")
    resumed = run_job(*SMALL, root=tmp_path)
    assert resumed.returncode == 0, resumed.output
    warnings = "\n".join(resumed.report["warnings"])
    assert "epochs [1] are missing in metrics.jsonl and in this report" in warnings
    assert f"trace.jsonl lacks its last {len(before) - 5} lines: it has a gap" in warnings
    expected = run_job(*SMALL).trace_rows
    assert resumed.trace_rows == [*expected[:4], *expected[len(before) - 1 :]]


def test_resume_with_other_data_starts_new_run(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    job = [*JOB, f"--data.root={root}"]
    stopped = run_job(*job, "--run.stop_after=2", root=tmp_path / "runs")
    assert stopped.exitcodes == {0: 4, 1: 4}, stopped.output
    image = next(path for path in sorted(root.rglob("*")) if path.is_file())
    shutil.copyfile(image, image.with_stem("another"))
    job_2 = run_job(*job, root=tmp_path / "runs")
    assert "its data differ: their digest was " in job_2.output
    assert (tmp_path / "runs" / "job-2" / "report.json").exists()
    assert stopped.report["run"]["stopped_after"] == 2
