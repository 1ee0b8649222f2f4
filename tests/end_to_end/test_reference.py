"""Whole jobs compared with a recorded run while they train."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_bad_input import messages
from tests.fixtures import SMALL
from tests.harness import Job, run_job
from tests.messages import codes, commands, texts
from tests.trace_rows import read_rows, write_rows

pytestmark = pytest.mark.xdist_group("reference")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two replicas, 10 steps in 2 epochs, every tensor recorded."""
    root = tmp_path_factory.mktemp("reference")
    job = run_job(*SMALL, "--agreement.record=tensors", "--run.name=reference", root=root)
    assert job.returncode == 0, job.output
    manifest = root / "reference" / "manifest.json"
    rows = json.loads(manifest.read_text())
    for row in rows:
        row.pop("commit", None)  # which may change meanwhile
    manifest.write_text(json.dumps(rows))
    return root / "reference"


def run(reference: Path, *arguments: str, num_replicas: int = 1, **keywords: Any) -> Job:
    return run_job(*SMALL, f"--run.reference={reference}", *arguments, num_replicas=num_replicas, **keywords)


def change(reference: Path, folder: Path, step: int, stage: str) -> Path:
    """Copy the reference and change one digest, as a run with a fault would."""
    shutil.copytree(reference, folder)
    rows = read_rows(folder)
    (row,) = (row for row in rows[1:] if row["step"] == step and stage in row["digests"])
    row["digests"][stage] = "0" * 32
    write_rows(folder, rows)
    return folder


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_equal_run_agrees_with_reference(num_replicas: int, reference: Path) -> None:
    job = run(reference, num_replicas=num_replicas)
    assert job.returncode == 0, job.output
    verdict = job.report["verdict"]
    same = (
        f"with {reference}, 10 steps: bit-identical" if num_replicas == 1 else f"the same as {reference} up to step 10"
    )
    assert verdict["agreed"]
    assert verdict["summary"].endswith(same)
    assert job.report["warnings"] == [], "a different name is not a difference"
    coverage = job.report["coverage"]
    assert (coverage["reference"]["run"], coverage["ranks"]) == (str(reference), num_replicas)
    assert coverage["reference"]["steps"] == 13, "the build, 10 steps and 2 evaluations"
    assert job.stdout.count("AGREED") == 1, "the reference is the second copy of a single replica"


def test_independent_replicas_agree_in_samples_only(reference: Path) -> None:
    job = run(reference, "--seed.model=distinct", "--optim.lr=0.02", num_replicas=2)
    assert job.returncode == 0, job.output
    assert job.report["verdict"]["summary"].endswith(f"; the same samples as {reference} up to step 10")
    assert job.report["warnings"][-1].startswith(f"only the samples were compared with the reference {reference}")


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_different_setting_stops_all_replicas(num_replicas: int, reference: Path) -> None:
    job = run(reference, "--optim.lr=0.02", num_replicas=num_replicas)
    assert job.exitcodes == dict.fromkeys(range(num_replicas), 3), job.output
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("config-differs", 1, "optimizer")
    assert (verdict["tensor"], verdict["suspects"], verdict["groups"]) == ("group0.lr", [], [[*range(num_replicas)]])
    assert commands(verdict["remedy"]) == ["--optim.lr 0.05"]
    assert "differs from the reference (config): optim.lr: 0.05 there, 0.02 here" in texts(verdict["evidence"])
    assert "reference: optim.lr was 0.05, and is 0.02 in this run" in job.output, "logged at the start"
    assert [row["step"] for row in job.trace_rows] == [0, 1]


def test_different_thread_count_is_proved_by_replay(reference: Path) -> None:
    """A replay with the reference's number of threads reproduces the reference's result."""
    job = run(reference, "--determinism.threads=2", num_replicas=2)
    assert job.exitcodes == {0: 3, 1: 3}, job.output
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"]) == ("config-differs", 1)
    assert "reference-settings-explain" in codes(verdict["evidence"])
    assert commands(verdict["remedy"]) == ["--determinism.threads 1"]


@pytest.mark.parametrize(
    ("argument", "step", "stage", "cause"),
    [
        ("--seed.data=7", 1, "indices", "config-differs"),
        ("--seed.model=7", 0, "weights", "config-differs"),
        ("--data.batch_size=20", 1, "indices", "config-differs"),
    ],
)
def test_different_setting_is_named_at_its_stage(
    argument: str, step: int, stage: str, cause: str, reference: Path
) -> None:
    verdict = run(reference, argument).report["verdict"]
    assert (verdict["step"], verdict["stage"], verdict["cause"]) == (step, stage, cause)


def test_fault_in_run_differs_from_fault_in_reference(reference: Path, tmp_path: Path) -> None:
    """One replica has no majority, but it has the reference and its own replays."""
    job = run(reference, "--inject=[{replica: 0, step: 7, target: weights}]")
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["suspects"]) == ("transient-fault", [0])
    assert (verdict["step"], verdict["stage"], verdict["epoch"]) == (7, "weights", 2)
    assert verdict["tensor"] is not None
    job = run(change(reference, tmp_path / "faulty", 7, "weights"))
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["suspects"]) == ("unexplained", []), "this run is sound"
    assert (verdict["step"], verdict["stage"], verdict["tensor"]) == (7, "weights", None)
    assert "reference-reproduces" in codes(verdict["evidence"])
    assert job.exitcodes == {0: 3}


def test_setting_without_earlier_effect_is_not_the_cause(reference: Path, tmp_path: Path) -> None:
    faulty = change(reference, tmp_path / "faulty", 7, "gradients")
    config = faulty / "config.yaml"
    config.write_text(config.read_text().replace("grad_clip: null", "grad_clip: 1000.0"))
    verdict = run(faulty).report["verdict"]
    assert (verdict["cause"], verdict["step"]) == ("unexplained", 7)
    assert "reference-acted-before" in codes(verdict["evidence"])
    assert any("train.grad_clip (1000.0 there, null here)" in line for line in texts(verdict["evidence"]))


def test_nondeterministic_operator_is_named_with_one_replica(tmp_path: Path) -> None:
    racy = (
        "--model.factory=dreplica.commands.cases.samples.models:racy_pooling",
        "--train.max_steps=2",
        "--train.epochs=1",
    )
    first = run_job(*SMALL, *racy, "--run.name=first", num_replicas=1, root=tmp_path)
    assert first.returncode == 0, first.output
    job = run(tmp_path / "first", *racy)
    verdict = job.report["verdict"]
    assert job.exitcodes == {0: 3}
    assert (verdict["cause"], verdict["operator"]) == ("nondeterministic-operator", "cases.racy_sum.default")
    assert (verdict["step"], verdict["stage"], verdict["suspects"]) == (1, "output", [0])


def test_different_evaluation_is_named(reference: Path, tmp_path: Path) -> None:
    verdict = run(change(reference, tmp_path / "other", 5, "predictions")).report["verdict"]
    assert (verdict["cause"], verdict["phase"], verdict["step"]) == ("evaluation-differs", "evaluation", 5)
    assert "reference-not-replayed" in codes(verdict["evidence"])


def test_divergence_between_replicas_comes_first(reference: Path) -> None:
    verdict = run(reference, "--inject=[{replica: 1, step: 7, target: weights}]", num_replicas=3).report["verdict"]
    assert (verdict["cause"], verdict["suspects"], verdict["step"]) == ("transient-fault", [1], 7)
    assert verdict["summary"].startswith("transient-fault: replicas diverged at step 7")


def test_run_continues_after_a_difference(reference: Path) -> None:
    job = run(reference, "--optim.lr=0.02", "--agreement.on_divergence=continue", num_replicas=2)
    assert job.exitcodes == {0: 3, 1: 3}
    assert (job.report["verdict"]["step"], job.report["steps_checked"]) == (1, 10)


@pytest.mark.parametrize("changed", [None, 9])
def test_resumed_run_is_compared_with_reference(changed: int | None, reference: Path, tmp_path: Path) -> None:
    recorded = reference if changed is None else change(reference, tmp_path / "other", changed, "weights")
    stopped = run(recorded, "--run.stop_after=7", "--agreement.record=tensors", root=tmp_path, num_replicas=2)
    assert stopped.exitcodes == {0: 4, 1: 4}, stopped.output
    assert stopped.report["verdict"]["summary"].endswith("up to step 7; stopped on request after step 7")
    resumed = run(recorded, "--agreement.record=tensors", root=tmp_path, num_replicas=2)
    assert resumed.report["run"]["resumed_from"] == 7
    if changed is None:
        assert resumed.returncode == 0, resumed.output
        assert (resumed.folder / "tensors.bin").read_bytes() == (reference / "tensors.bin").read_bytes()
    else:
        verdict = resumed.report["verdict"]
        assert (verdict["step"], verdict["stage"], verdict["cause"]) == (9, "weights", "unexplained")


def test_shorter_reference_is_warned_of(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "cut")
    path = tmp_path / "cut" / "trace.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    job = run(tmp_path / "cut", "--train.epochs=3")
    assert job.returncode == 0, job.output
    cut_off = "reference: its last line is incomplete and was ignored; its last step is 10"
    late = f"the reference {tmp_path / 'cut'} ends at step 10: later steps were not compared with it"
    assert job.report["warnings"] == [cut_off, late]


def test_independent_replicas_are_compared_in_samples(reference: Path) -> None:
    assert run(reference, "--seed.model=distinct", num_replicas=2).returncode == 0
    job = run(reference, "--seed.model=distinct", "--seed.data=7", num_replicas=2)
    verdict = job.report["verdict"]
    assert (verdict["stage"], verdict["cause"], job.exitcodes) == ("indices", "config-differs", {0: 3, 1: 3})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--run.reference=nowhere",), "run.reference: 'nowhere' does not exist"),
        (("--agreement.every=0",), "has no effect because agreement.every is 0"),
        (("--run.reference={old}",), "has digests of algorithm 'xxh3-128/0', but this run computes 'xxh3-128/1'"),
        (("--run.reference={damaged}",), "trace.jsonl' is damaged at line 4"),
    ],
)
def test_unusable_reference_ends_the_run_at_the_start(
    arguments: tuple[str, ...], words: str, reference: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(reference, old)
    header, *rows = read_rows(old)
    write_rows(old, [header | {"algorithm": "xxh3-128/0"}, *rows])
    damaged = tmp_path / "damaged"
    shutil.copytree(reference, damaged)
    path = damaged / "trace.jsonl"
    path.write_bytes(path.read_bytes().replace(b"[2,1,0,", b"[2,1,1,", 1))
    given = (argument.format(old=old, damaged=damaged) for argument in arguments)
    job = run(reference, *given, num_replicas=2, root=tmp_path)
    assert job.exitcodes == {0: 2, 1: 2}
    (message,) = messages(job.output)
    assert words in message
    assert not job.folder.exists()


def test_own_run_folder_is_not_a_reference(tmp_path: Path) -> None:
    assert run_job(*SMALL, "--run.stop_after=3", num_replicas=2, root=tmp_path).exitcodes == {0: 4, 1: 4}
    job = run(tmp_path / "job", num_replicas=2, root=tmp_path)
    assert job.exitcodes == {0: 2, 1: 2}
    (message,) = messages(job.output)
    assert "is the folder of the run that is resumed" in message
