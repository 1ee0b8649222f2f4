"""`dreplica compare` on real runs: text, JSON and exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dreplica.commands.compare import RunPair
from dreplica.commands.main import main
from dreplica.errors import ExitCode, UsageError
from tests.agreement.recording import record
from tests.fixtures import SMALL
from tests.harness import REPOSITORY, environment, run_job
from tests.trace_rows import read_rows, write_rows

pytestmark = pytest.mark.xdist_group("compare")

RUNS = {
    "one": (2, ()),
    "again": (1, ()),
    "threads": (1, ("--determinism.threads=2",)),
    "seed": (1, ("--seed.data=7",)),
    "stopped": (1, ("--run.stop_after=7",)),
    "independent": (2, ("--seed.model=distinct",)),
    "other": (2, ("--seed.model=distinct", "--optim.lr=0.5")),
    "diverged": (2, ("--inject=[{replica: 0, step: 8, target: weights}]", "--agreement.on_divergence=continue")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of run folders, each with its tensors recorded."""
    root = tmp_path_factory.mktemp("runs")
    for name, (num_replicas, arguments) in RUNS.items():
        arguments = (*SMALL, "--agreement.record=tensors", f"--run.name={name}", *arguments)
        job = run_job(*arguments, root=root, num_replicas=num_replicas)
        assert job.returncode == 0 or name in ("stopped", "diverged"), job.output
        manifest = root / name / "manifest.json"
        rows = [{**row, "commit": None} for row in json.loads(manifest.read_text())]  # which may change meanwhile
        manifest.write_text(json.dumps(rows))
    return root


def compare(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = main(["compare", *map(str, arguments)])
    return code, capsys.readouterr().out


def compare_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    code, output = compare(capsys, "--json", *arguments)
    return code, json.loads(output)


def test_same_config_twice_is_identical(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A different number of replicas and a different run name do not matter."""
    code, found = compare_json(capsys, runs / "one", runs / "again")
    assert (code, found["outcome"]) == (ExitCode.AGREED, "identical")
    assert (found["steps_same"], found["first_difference"]) == (10, None)
    assert found["digests_same"] == {
        **dict.fromkeys(["indices", "output", "gradients", "optimizer"], 10),
        "batch": 12,
        "buffers": 11,
        "weights": 11,
        "rng": 11,
        "predictions": 2,
    }
    assert [(item["field"], item["matters"]) for item in found["config"]] == [("run.name", False)]
    assert found["manifest"] == []
    assert found["notes"] == ["2 and 1 replicas"]
    code, output = compare(capsys, runs / "one", runs / "again")
    assert code == ExitCode.AGREED
    assert output.splitlines()[-1].startswith("IDENTICAL 10 steps, 87 digests of indices, batch, buffers, ")


def test_different_thread_count_is_located(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = compare_json(capsys, runs / "one", runs / "threads")
    assert (code, found["outcome"]) == (ExitCode.DIVERGED, "differ")
    first = found["first_difference"]
    stages = [read_rows(runs / name)[2] for name in ("one", "threads")]
    assert [row["step"] for row in stages] == [1, 1]
    names = list(stages[0]["digests"])
    differing = [name for name in names if stages[0]["digests"][name] != stages[1]["digests"][name]]
    assert (first["step"], first["stage"], first["differing_stages"]) == (1, differing[0], differing)
    assert first["tensor"] in {"0.weight", "0.bias", "5.weight", "5.bias", "1.running_mean", "1.running_var", "logits"}
    assert 0 < first["num_differing"] <= first["num_entries"]
    fields = {item["field"]: (item["one"], item["other"]) for item in found["config"] + found["manifest"]}
    assert fields["determinism.threads"] == fields["numerics.threads"] == (1, 2)
    _, output = compare(capsys, runs / "one", runs / "threads")
    (verdict,) = (line for line in output.splitlines() if line.startswith("DIFFERENT"))
    where = f"diverged at step 1: {first['stage']}, {first['tensor']}"
    differences = "the configs differ in determinism.threads (1, 2) and the manifests in numerics.threads (1, 2)"
    assert verdict == f"DIFFERENT {where}; {differences}"


def test_different_data_seed_is_located(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = compare_json(capsys, runs / "one", runs / "seed")
    assert code == ExitCode.DIVERGED
    first = found["first_difference"]
    assert (first["step"], first["stage"], first["tensor"]) == (1, "indices", "indices")
    assert found["summary"].endswith("the configs differ in seed.data (0, 7)")


def test_shorter_run_is_a_prefix(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = compare_json(capsys, runs / "one", runs / "stopped")
    assert (code, found["outcome"]) == (ExitCode.FAILED, "prefix")
    assert [run["last_step"] for run in found["runs"]] == [10, 7]
    assert f"{runs / 'stopped'} ends at step 7; up to there both are the same: 7 steps" in found["summary"]
    assert compare(capsys, runs / "one", runs / "stopped", "--prefix")[0] == ExitCode.AGREED
    assert compare(capsys, runs / "one", runs / "seed", "--prefix")[0] == ExitCode.DIVERGED


def test_incomplete_last_line_is_ignored(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "again", tmp_path / "cut")
    path = tmp_path / "cut" / "trace.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    code, found = compare_json(capsys, runs / "one", tmp_path / "cut")
    assert (code, found["outcome"]) == (ExitCode.FAILED, "prefix")
    assert "ends at step 10; up to there" in found["summary"], "its last whole line is step 10's, not the evaluation's"
    assert any("the last line is incomplete" in note for note in found["notes"])


def test_run_whose_replicas_diverged_is_noted(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = compare_json(capsys, runs / "one", runs / "diverged")
    assert code == ExitCode.DIVERGED
    first = found["first_difference"]
    assert (first["step"], first["stage"]) == (8, "weights"), "the flipped bit is replica 0's"
    assert [run["parted_at"] for run in found["runs"]] == [None, 8]
    assert any("its own 2 replicas diverged at step 8 (" in note for note in found["notes"])


def test_independent_replicas_compare_final_states(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the samples are recorded per step, and equal samples prove nothing about the states."""
    code, found = compare_json(capsys, runs / "independent", runs / "other")
    assert (code, found["outcome"], found["first_difference"]) == (ExitCode.DIVERGED, "differ", None)
    assert found["differ_at_the_end"] == {"weights": [0, 1], "buffers": [0, 1], "optimizer": [0, 1]}
    assert found["summary"].endswith("the configs differ in optim.lr (0.05, 0.5)")
    code, found = compare_json(capsys, runs / "one", runs / "independent")
    assert (code, found["differ_at_the_end"]["weights"]) == (ExitCode.DIVERGED, [1]), "replica 0's seed is the same"
    again = Path(shutil.copytree(runs / "independent", tmp_path / "again"))
    code, found = compare_json(capsys, runs / "independent", again)
    assert (code, found["outcome"]) == (ExitCode.AGREED, "identical")
    assert found["summary"].endswith("of indices, batch; the same weights, buffers, optimizer at the end")
    report = json.loads((again / "report.json").read_text())
    for last_step in (5, 11):  # resumed since then, or took a step that was not compared
        report["run"]["last_step"] = last_step
        (again / "report.json").write_text(json.dumps(report))
        assert compare_json(capsys, runs / "independent", again)[1]["outcome"] == "samples"
    (again / "report.json").unlink()
    for arguments in ((), ("--prefix",)):
        assert compare_json(capsys, runs / "independent", again, *arguments)[0] == ExitCode.FAILED
    assert "SAME SAMPLES 10 steps" in compare(capsys, runs / "other", again)[1]


def test_corrupted_files_are_reported(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of corruption is reported in one line."""
    folder = Path(shutil.copytree(runs / "again", tmp_path / "run"))
    (folder / "manifest.json").write_text("[1, 2]")
    for content in ('{"run": {"last_step": "x"}}', '{"verdict": 3, "fingerprints": [4]}'):
        (folder / "report.json").write_text(content)
        assert main(["compare", str(runs / "independent"), str(folder)]) == ExitCode.FAILED
    capsys.readouterr()
    code, found = compare_json(capsys, runs / "one", folder)
    assert (code, found["manifest"]) == (ExitCode.AGREED, None)
    assert f"{folder}: manifest.json is not the file of a run" in found["notes"]
    header, *lines = (folder / "trace.jsonl").read_bytes().splitlines(keepends=True)
    spoiled = {
        b'{"algorithm": "xxh3-128/1", "torch": "2", "replicas": Infinity}\n': "does not begin with the header",
        header + b'[0,null,0,128,"\xff"]\n': "is damaged at line 2",
        header + lines[0].replace(b"[0,", b"[" + b"1" * 5000 + b","): "is damaged at line 2",
        header + lines[1]: "is damaged at line 2",
        header + lines[0] + lines[0]: "is damaged at line 3",
        header.replace(b"128", b"129"): "is damaged at line 1",
    }
    for content, words in spoiled.items():
        (folder / "trace.jsonl").write_bytes(content)
        assert main(["compare", str(runs / "one"), str(folder)]) == ExitCode.UNUSABLE
        assert words in capsys.readouterr().err
    os.mkfifo(tmp_path / "pipe")
    assert main(["compare", str(runs / "one"), str(tmp_path / "pipe")]) == ExitCode.UNUSABLE
    assert "is not a regular file" in capsys.readouterr().err


def test_traces_without_run_folder(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(runs / "seed" / "trace.jsonl", tmp_path / "some.jsonl")
    code, found = compare_json(capsys, runs / "one" / "trace.jsonl", tmp_path / "some.jsonl")
    assert code == ExitCode.DIVERGED
    assert (found["config"], found["manifest"], found["first_difference"]["tensor"]) == (None, None, None)
    assert "how the runs differ is not recorded" in found["summary"]
    assert f"{tmp_path / 'some.jsonl'}: there is no config.yaml" in found["notes"]


def test_runs_of_custom_loops_have_no_config(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing config is not remarked on, and the last line says what explains the stage."""
    folders = [Path(shutil.copytree(runs / name, tmp_path / name)) for name in ("one", "seed")]
    for folder in folders:
        (folder / "config.yaml").unlink()
        rows = json.loads((folder / "manifest.json").read_text())
        rows = [{**row, "argv": ["loop.py", "--out", str(folder)]} for row in rows]
        (folder / "manifest.json").write_text(json.dumps(rows))
    code, found = compare_json(capsys, *folders)
    assert (code, found["config"], found["manifest"]) == (ExitCode.DIVERGED, None, [])
    assert found["notes"] == ["2 and 1 replicas"]
    assert found["summary"].endswith("; no difference in the manifest explains it")
    _, output = compare(capsys, *folders)
    assert output.splitlines()[0] == "config: not recorded"
    assert output.splitlines()[-1] == "  explain: dreplica explain indices"


def test_difference_at_step_0_is_explained_as_build(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "again", tmp_path / "run")
    header, build, *rows = read_rows(tmp_path / "run")
    digests = build["digests"] | {"weights": "0" * 32}
    write_rows(tmp_path / "run", [header, build | {"digests": digests}, *rows])
    (tmp_path / "run" / "tensors.bin").unlink()
    code, output = compare(capsys, runs / "one", tmp_path / "run")
    assert code == ExitCode.DIVERGED
    assert output.splitlines()[-1] == "  explain: dreplica explain build"


def test_unusable_traces_are_reported(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "again", tmp_path / "run")
    header, *rows = read_rows(tmp_path / "run")
    write_rows(tmp_path / "run", [header | {"algorithm": "xxh3-128/0"}, *rows])
    for other, words in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "run", "cannot be compared")):
        assert main(["compare", str(runs / "one"), str(other)]) == ExitCode.UNUSABLE
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line
    assert main(["compare", str(runs / "one")]) == ExitCode.UNUSABLE


def test_user_text_is_not_markup(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "again", tmp_path / "[bold]run[/]")
    config = tmp_path / "[bold]run[/]" / "config.yaml"
    config.write_text(re.sub("name: again", "name: '[red]x[/nothing]'", config.read_text()))
    code, output = compare(capsys, runs / "one", tmp_path / "[bold]run[/]")
    assert code == ExitCode.AGREED
    assert "[red]x[/nothing]" in output


def test_compare_does_not_import_torch(runs: Path) -> None:
    """Importing torch takes seconds, and more memory than the comparison."""
    code = (
        "import sys; from dreplica.commands.main import main; "
        "code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "compare", str(runs / "one"), str(runs / "again")]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY, env=environment(), timeout=60)


def test_runs_with_nothing_in_common_name_the_arguments(tmp_path: Path) -> None:
    one = record(tmp_path / "a", [1], names=["weights"])
    other = record(tmp_path / "b", [1], names=["batch"])
    with pytest.raises(UsageError, match=r"with the same every, stages and expect \(in the trainer: ") as caught:
        RunPair(one, other)
    assert caught.value.code == "nothing-in-common"
