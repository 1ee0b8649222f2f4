"""`dreplica certify-resume`: certified if all state is restored, and the component named if not."""

import json
from pathlib import Path

import pytest

from dreplica.commands.certify_resume import Certificate, judge
from dreplica.commands.main import main
from dreplica.distributed.launch.error_record import ERROR_FILE, read_error
from dreplica.errors import ExitCode
from tests.data.pictures import make_folder
from tests.end_to_end.test_image_folder import AUGMENTED
from tests.fixtures import SMALL
from tests.harness import REPOSITORY, run_job


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


STEP = ("--schedule={name: StepLR, step_size: 1}", "--checkpoint.every_epochs=null")


def certify(*job: str, at_step: int, root: Path) -> Certificate:
    """As `certify_resume` does, with workers that start quickly."""
    straight = run_job(*job)
    assert straight.returncode == 0, straight.output
    stopped = run_job(*job, f"--run.stop_after={at_step}", root=root)
    assert stopped.exitcodes == {0: 4, 1: 4}, stopped.output
    record = root / "error.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ERROR_FILE, str(record))
        resumed = run_job(*job, root=root)
    return judge(straight.folder, resumed.folder, at_step, read_error(record))


def test_certify_passes_if_all_is_restored(tmp_path: Path) -> None:
    images = ("--data.name=imagefolder", "--data.image_size=8", "--data.batch_size=5", "--data.val_fraction=0.25")
    loading = (f"--data.root={make_folder(tmp_path / 'images')}", "--data.num_workers=1", *AUGMENTED)
    job = (*SMALL[1:], *images, *loading, *STEP, "--optim={name: AdamW}", "--train.amp=bf16", "--seed.model=3")
    found = certify(*job, at_step=6, root=tmp_path)
    assert found.passed, found.text
    assert "interrupted after step 6 of 8: 2 steps resumed" in found.text


def test_certify_independent_replicas(tmp_path: Path) -> None:
    found = certify(*SMALL, *STEP, "--seed.model=distinct", at_step=7, root=tmp_path)
    assert found.passed, found.text
    assert "3 steps resumed, 7 digests" in found.text, "indices and batch of each, and the evaluation's batch"


@pytest.mark.process
@pytest.mark.cluster
def test_certify_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify-resume", "--at-step=7", "--replicas=1", *SMALL]) == ExitCode.AGREED
    assert "CERTIFIED interrupted after step 7 of 10: 3 steps resumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nothing", "interrupted after step 7 of 10: 3 steps resumed"),
        ("position", "not restored: the position in the data (step 8, indices)"),
        ("generators", "torch.cpu in rng differs from its saved digest"),
        ("momentum", "0.weight.momentum_buffer in optimizer differs from its saved digest"),
        ("scheduler", "StepLR.last_epoch in optimizer differs from its saved digest"),
    ],
)
def test_certify_names_state_missing_from_checkpoint(what: str, words: str, tmp_path: Path) -> None:
    factory = f"--model.factory=tests.end_to_end.leaving_out:{what}"
    found = certify(*SMALL, factory, *STEP, "--optim={name: SGD, lr: 0.05, momentum: 0.9}", at_step=7, root=tmp_path)
    assert found.passed == (what == "nothing")
    assert words in found.text


@pytest.mark.parametrize(
    ("step", "stage", "words"),
    [
        (6, "weights", "the job does not reproduce even without an interruption: step 6, weights."),
        (7, "weights", "the job does not reproduce even without an interruption: step 7, weights."),
        (7, "predictions", "not restored: state that the evaluation depends on (step 7, predictions)"),
        (8, "weights", "not restored: weights, or other state that the optimizer step depends on (step 8, weights)"),
    ],
)
def test_judge_difference_before_interruption(step: int, stage: str, words: str, tmp_path: Path) -> None:
    header = {"algorithm": "some", "torch": "2", "replicas": 2}
    for name in ("straight", "interrupted"):
        (tmp_path / name).mkdir()
        report = {"schema": 2, "run": {"resumed_from": 7}}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        other = name == "interrupted"
        rows = [
            {"step": number, "epoch": 1, "agreed": True, "digests": {"weights": "a" * 32}} for number in range(1, 9)
        ]
        rows.insert(7, {"step": 7, "epoch": 1, "agreed": True, "digests": {"predictions": "a" * 32}})
        for row in rows:
            row["digests"] |= {key: "b" * 32 for key in row["digests"] if (row["step"], key) == (step, stage) and other}
        (tmp_path / name / "trace.jsonl").write_text("\n".join(map(json.dumps, [header, *rows])) + "\n")
    found = judge(tmp_path / "straight", tmp_path / "interrupted", 7)
    assert not found.passed
    assert found.text.startswith(words)


def test_judge_rejects_different_algorithms(tmp_path: Path) -> None:
    for name, algorithm in (("straight", "one/1"), ("interrupted", "two/1")):
        (tmp_path / name).mkdir()
        report = {"schema": 2, "run": {"resumed_from": 1}}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        header = {"algorithm": algorithm, "torch": "2", "replicas": 1}
        (tmp_path / name / "trace.jsonl").write_text(json.dumps(header) + "\n")
    found = judge(tmp_path / "straight", tmp_path / "interrupted", 1)
    assert (found.passed, found.text) == (False, "digests of one/1 cannot be compared with those of two/1")


def test_judge_rejects_unreadable_report(tmp_path: Path) -> None:
    for name in ("straight", "interrupted"):
        (tmp_path / name).mkdir()
    (tmp_path / "straight" / "report.json").write_text(json.dumps({"schema": 2, "run": {"resumed_from": 1}}))
    (tmp_path / "interrupted" / "report.json").write_text("{")
    found = judge(tmp_path / "straight", tmp_path / "interrupted", 1)
    assert not found.passed
    assert found.text.startswith("interrupted: report.json cannot be read: ")


@pytest.mark.process
@pytest.mark.cluster
def test_certify_rejects_step_beyond_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify-resume", "--at-step=10", "--replicas=1", *SMALL]) == ExitCode.UNUSABLE
    printed = capsys.readouterr()
    assert printed.err == "error: --at-step: expected less than the 10 steps of the run, got 10.\n"
    assert "2 of 3" not in printed.out


def test_certify_requires_at_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify-resume", *SMALL]) == ExitCode.UNUSABLE
    assert "--at-step: a step is required" in capsys.readouterr().err


def test_certify_leaves_files_in_keep_untouched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "straight" / "mine").touch()
    assert main(["certify-resume", "--at-step=1", f"--keep={tmp_path}", *SMALL]) == ExitCode.UNUSABLE
    assert "is not empty. Use a new or empty folder." in capsys.readouterr().err
    assert (tmp_path / "straight" / "mine").exists()
