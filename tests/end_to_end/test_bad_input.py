"""Invalid input: exit code 2 of each worker, one message in all, no traceback, and no files left behind."""

from pathlib import Path

import pytest

from dreplica.errors import ExitCode
from dreplica.run.run import run_worker
from tests.fixtures import SMALL, merged
from tests.harness import Job, run_job, run_workers, torchrun


def messages(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def assert_unusable(job: Job, num_replicas: int = 2) -> str:
    """Check that a job was refused as unusable, and return its only message."""
    assert job.exitcodes == dict.fromkeys(range(num_replicas), 2), job.output
    ours = job.output.partition("ChildFailedError")[0]  # torchrun prints its own traceback
    assert "dreplica/" not in ours.partition("Traceback")[2]
    assert not job.folder.exists()
    (message,) = messages(job.output)
    return message


def test_invalid_value_ends_all_workers_with_one_message() -> None:
    message = assert_unusable(torchrun(*SMALL, "--optim.lr", "-1"), 2)
    assert message == "error: command line: optim.lr: expected a value >= 0, got -1."


def test_help_is_printed_once() -> None:
    job = run_job("--help")
    assert job.returncode == 0, job.output
    assert job.stdout.count("--optim.lr VALUE") == 1
    assert not job.folder.exists()


def test_config_file_missing_on_one_replica_ends_all(tmp_path: Path) -> None:
    job = run_workers([SMALL, [*SMALL, "--config=not/on/this/node.yaml"]], tmp_path)
    message = assert_unusable(job)
    assert message.startswith("error: replica 1: --config: no file 'not/on/this/node.yaml'")
    assert list(tmp_path.iterdir()) == []


def test_different_command_lines_give_config_differs(tmp_path: Path) -> None:
    job = run_workers([[*SMALL, f"--optim.lr={lr}"] for lr in (0.1, 0.2, 0.1)], tmp_path)
    assert job.exitcodes == {0: 3, 1: 3, 2: 3}, job.output
    verdict = job.report["verdict"]
    assert (verdict["agreed"], verdict["cause"]) == (False, "config-differs")
    assert (verdict["suspects"], verdict["groups"]) == ([1], [[0, 2], [1]])
    (evidence,) = [item for item in verdict["evidence"] if item["code"] == "field-differs"]
    assert evidence["data"]["field"] == "optim.lr"
    assert evidence["text"] == "optim.lr: 0.1 on replicas 0, 2; 0.2 on replica 1"
    assert "optim.lr" in verdict["summary"]
    assert verdict["remedy"]
    assert [row["replica"] for row in job.report["replicas"]] == [0, 1, 2]
    assert "Traceback" not in job.output


def test_flag_changed_by_factory_is_found_before_first_step() -> None:
    job = run_job(*SMALL, "--model.factory=tests.end_to_end.bad_input:model_with_other_threads", num_replicas=3)
    assert job.exitcodes == {0: 3, 1: 3, 2: 3}, job.output
    verdict = job.report["verdict"]
    assert (verdict["agreed"], verdict["cause"], verdict["suspects"]) == (False, "environment-differs", [1])
    assert "numerics.threads: 1 on replicas 0, 2; 2 on replica 1" in [item["text"] for item in verdict["evidence"]]
    assert job.report["steps_checked"] == 0


def test_unreadable_sample_gives_one_message() -> None:
    job = run_job(*SMALL, "--data.name=tests.end_to_end.bad_input:broken_image")
    assert set(job.exitcodes.values()) <= {1, 2}, job.output
    assert 2 in job.exitcodes.values()
    assert messages(job.output) == ["error: data.root: sample 7 is no image. Remove it."]


ALONE = {
    "unknown model": (
        ["--model.factory=null", "--model.name=resnet81"],
        ["model.name", "'resnet81'", "Did you mean 'resnet18'"],
    ),
    "unknown data set": (["--data.name=digit"], ["data.name", "'digit'", "'digits'"]),
    "malformed factory": (
        ["--model.factory=resnet18"],
        ["model.factory: expected package.module:function, got 'resnet18'."],
    ),
    "relative factory": (["--model.factory=..x:f"], ["model.factory: expected package.module:function, got '..x:f'."]),
    "missing module": (
        ["--model.factory=tests.nothing.here:build"],
        ["model.factory:", "no module named 'tests.nothing'", "PYTHONPATH"],
    ),
    "missing function": (
        ["--model.factory=tests.fixtures:tiny_modle"],
        ["model.factory:", "has no function 'tiny_modle'", "Did you mean 'tiny_model'?"],
    ),
    "model factory returning a dict": (
        ["--model.factory=tests.end_to_end.bad_input:not_a_model"],
        ["model.factory:", "returned dict. Return an nn.Module"],
    ),
    "replica factory returning a model": (
        ["--replica.factory=tests.end_to_end.bad_input:no_replica"],
        ["replica.factory:", "returned Linear. Return dreplica.Replica("],
    ),
    "criterion that is no module": (
        ["--replica.factory=tests.end_to_end.bad_input:criterion_is_a_function"],
        ["replica.factory: the criterion that", "criterion_is_a_function' returned is a function. Return an nn.Module"],
    ),
    "model without num_classes": (
        ["--model.factory=tests.end_to_end.bad_input:takes_nothing"],
        ["model.factory: 'tests.end_to_end.bad_input:takes_nothing' cannot be called with (num_classes=)"],
    ),
    "capturable on the CPU": (
        ["--optim={name: Adam, capturable: true}"],
        ["optim.capturable: expected false, got true.", "on the CPU"],
    ),
    "data factory returning a dict": (
        ["--data.name=tests.end_to_end.bad_input:not_a_model"],
        ["data.name:", "returned dict"],
    ),
    "more replicas than GPUs": (["--world.device=cuda"], ["world.device: 'cuda'", "--world.device auto"]),
    "root is a file": (["--run.root={file}"], ["run.root: expected a folder, got the file '{file}'", "--run.root"]),
    "root cannot be made": (["--run.root=/proc/runs"], ["run.root:", "/proc/runs", "--run.root"]),
    "schedule shorter than the run": (
        ["--schedule={name: OneCycleLR, max_lr: 1.0, total_steps: 9, per: step}"],
        ["schedule: OneCycleLR cannot be stepped for train.epochs = 2 epochs of 10 steps", "once each step"],
    ),
    "scheduler_per with an unknown value": (
        ["--replica.factory=tests.end_to_end.bad_input:scheduled_per_batch"],
        ["replica.factory: the replica that", "scheduler_per='batch'. Set it to 'epoch' or 'step'"],
    ),
    "factory that is a number": (["--model.factory=3"], ["model.factory: expected text, got 3."]),
}


@pytest.mark.parametrize(("arguments", "parts"), ALONE.values(), ids=ALONE.keys())
def test_single_replica_refuses_invalid_input(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    file, root = tmp_path / "file", tmp_path / "runs"
    file.touch()
    given = merged(*SMALL, f"--run.root={root}", *arguments)
    code = run_worker([token.format(file=file) if "{file}" in token else token for token in given])
    captured = capfd.readouterr()
    (message,) = messages(captured.err)
    assert [part for part in parts if part.format(file=file) not in message] == [], message
    assert code == ExitCode.UNUSABLE
    assert "Traceback" not in captured.err
    assert not root.exists()


def test_model_returning_tuple_is_refused(tmp_path: Path) -> None:
    job = run_job(*SMALL, "--model.factory=tests.end_to_end.bad_input:Pair", root=tmp_path, num_replicas=2)
    assert job.exitcodes == {0: 2, 1: 2}
    (message,) = messages(job.output)
    assert message.startswith("error: model.factory: expected a model that returns logits")


def test_last_batch_too_small_for_batch_norm_is_refused(tmp_path: Path) -> None:
    job = run_job(
        *SMALL, "--model.factory=tests.training.test_loop:pooled", "--data.batch_size=79", root=tmp_path, num_replicas=2
    )
    assert job.exitcodes == {0: 2, 1: 2}
    assert "data.batch_size: 79" in job.stderr
    assert not list(tmp_path.iterdir())


def test_start_time_does_not_depend_on_epochs() -> None:
    job = run_job(
        *SMALL, "--train.epochs=3000000", "--train.max_steps=2", "--schedule={name: StepLR, step_size: 3}", timeout=60
    )
    assert job.returncode == 0, job.output
    assert job.report["steps_checked"] == 2


def test_empty_override_declares_no_difference() -> None:
    job = run_job(*SMALL, "--overrides={1: {train: null, data: null, optim: null}}")
    assert job.returncode == 0, job.output
    verdict = job.report["verdict"]
    assert (verdict["cause"], [row["epoch"] for row in job.report["epochs"]]) == ("none", [1, 2])


def test_independent_replicas_may_have_different_outputs() -> None:
    job = run_job(*SMALL, "--seed.model=distinct", "--overrides.1.model.num_classes=7")
    assert job.returncode == 0, job.output
    spread = job.report["spread"]
    accuracies = job.values("val", "accuracy")
    assert spread["accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    assert (spread["n"], len(spread["disagreement"])) == (2, 2)
