"""report.html of runs in every state, without a browser. Tests in a browser are in test_browser."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor, nn

from dreplica.agreement.wiring.fault import WiringError
from dreplica.commands import main as cli
from dreplica.diagnosis.decision.conclude import wiring_fault
from dreplica.report.html.render import render
from dreplica.report.html.run_files import read_run
from tests.fixtures import SMALL, tiny_model
from tests.harness import run_job
from tests.report.page import Text
from tests.trace_rows import read_rows, write_rows

pytestmark = pytest.mark.xdist_group("report")  # one worker makes the runs

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"


def text_of(folder: Path) -> str:
    return Text(render(read_run(folder))).text


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that diverged at its first step and continued."""
    root = tmp_path_factory.mktemp("runs")
    arguments = ("--overrides.1.determinism.onednn=false", "--agreement.on_divergence=continue", "--run.name=diverged")
    job = run_job(*SMALL, *arguments, root=root)
    assert job.exitcodes == {0: 3, 1: 3}, job.output
    return root / "diverged"


@pytest.fixture
def folder(diverged: Path, tmp_path: Path) -> Path:
    """A copy of the diverged run's folder to change."""
    return Path(shutil.copytree(diverged, tmp_path / "run"))


def test_run_writes_report_html(diverged: Path) -> None:
    page = (diverged / "report.html").read_text()
    text = Text(page).text
    assert "Replicas diverged because the config gives them different settings." in text
    assert "Replicas diverged at step 1 of epoch 1, in the buffers, first in 1.running_mean." in text
    assert "remove the override, or set it for all replicas" in text
    assert "10 steps compared, replicas differ in 10." in text
    assert "numerics.onednn" in text
    assert len(page) < 500_000
    operators = json.loads((diverged / "report.json").read_text())["divergence"]["path"]["operators"]
    for row in operators:
        assert f"{row['max_ulp']:,} ULP" in text
    for phase in ("loading", "forward", "backward", "optimizer", "checks", "evaluation"):
        assert re.search(rf"{phase} \d+\.\d%", text), phase


def test_report_command_renders_same_page_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Text((folder / "report.html").read_text()).text
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    after = Text((folder / "report.html").read_text()).text
    assert after.partition("Made by")[0] == before.partition("Made by")[0]


def test_report_command_refuses_other_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert cli.main(["report", str(path)]) == 2
        assert "is not a run folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_page_of_run_in_progress_shows_last_step(folder: Path) -> None:
    (folder / "report.json").unlink()
    rows = read_rows(folder)
    write_rows(folder, [rows[0], *(row | {"agreed": True} for row in rows[1:9])])
    with (folder / "trace.jsonl").open("a") as file:
        file.write("[9,1,0,25")
    metrics = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(metrics[0] + metrics[1][:-1])
    text = text_of(folder)
    assert "Still running, or ended without a report." in text
    assert f"Last step recorded: {rows[8]['step']} of epoch {rows[8]['epoch']}." in text
    assert "replicas agree in all of them" in text
    assert len(read_run(folder).epochs) == 1, "the second line is incomplete"


def test_wiring_fault_is_not_shown_as_divergence(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    verdict = wiring_fault(WiringError("it holds none of them", code="optimizer-not-bound", tensor="0.weight"), [1], 2)
    (folder / "report.json").write_text(json.dumps(report | {"verdict": verdict.as_dict(), "divergence": None}))
    text = text_of(folder)
    assert "Fault found optimizer-not-bound" in text
    assert "It holds none of them. Suspected: replica 1." in text
    assert "Replicas diverged" not in text


def test_page_of_long_run_with_many_replicas_is_small(folder: Path) -> None:
    (row, *_) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, 301):
            values = [epoch / 7 + r for r in range(64)]
            parts = {part: {"loss": values, "accuracy": values} for part in ("train", "val")}
            timing = dict.fromkeys(row["timing"], values)
            file.write(json.dumps(row | parts | {"epoch": epoch, "timing": timing}) + "\n")
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"replicas": 32 * report["replicas"]}))
    page = render(read_run(folder))
    assert "62 of 300 epochs, evenly spaced." in Text(page).text
    assert len(page) < 3_000_000


def test_page_of_crash_before_first_step(folder: Path) -> None:
    for name in ("report.json", "trace.jsonl", "metrics.jsonl", "manifest.json"):
        (folder / name).unlink()
    text = text_of(folder)
    assert "Still running, or ended without a report." in text
    assert "No step is recorded yet." in text


def test_page_of_run_in_progress_shows_divergence(folder: Path) -> None:
    (folder / "report.json").unlink()
    assert "Replicas differ at step 1; no cause is recorded." in text_of(folder)


@pytest.mark.parametrize("name", ["report.json", "manifest.json", "metrics.jsonl", "config.yaml"])
def test_damaged_file_is_named_and_rest_is_shown(folder: Path, name: str) -> None:
    (folder / name).write_text('{"cut": off\n')
    text = text_of(folder)
    assert f"{name} cannot be read" in text
    assert "10 steps compared" in text


UNUSABLE = {"cut": "{", "list": "[]", "newer": '{"schema": 9}', "text": '{"schema": "2"}', "nested": "[" * 99_999}


@pytest.mark.parametrize("content", UNUSABLE.values(), ids=UNUSABLE)
def test_report_command_refuses_unusable_report(content: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.json").write_text(content)
    (folder / "report.html").unlink(missing_ok=True)
    assert cli.main(["report", str(folder)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: report.json ")
    assert "The page shows the other files of" in line
    assert "10 steps compared" in Text((folder / "report.html").read_text()).text


INVALID = [
    ("report.json", ["verdict"], 3, "verdict: Input should be"),
    ("report.json", ["verdict", "groups"], [[0], 1], "verdict.groups.1: Input should be"),
    ("report.json", ["run"], [], "run: Input should be"),
    ("report.json", ["run", "seconds"], 10**400, "run.seconds: Input should be"),
    ("report.json", ["spread"], {"n": 2, "accuracy_mean": None}, "spread.accuracy_mean: Input should be"),
    ("report.json", ["divergence", "path", "operators", 0, "max_ulp"], "x", "divergence.path"),
    ("report.json", ["distance", 0, "epoch"], [], "distance.0.epoch: Input should be"),
    ("report.json", ["fingerprints", 0, "weights"], 3, "fingerprints.0.weights: Input should be"),
    ("report.json", [], [], "report.json is not a run report: expected an object, got list"),
    ("manifest.json", [0, "device"], "cpu", "manifest.json cannot be read: 0.device: Input should be"),
    ("config.yaml", ["run"], "x", "run: Input should be"),
    ("config.yaml", ["overrides"], {1: {"determinism": 3}}, "overrides.1.determinism: Input should be"),
    ("metrics.jsonl", ["train", "loss"], None, "metrics.jsonl cannot be read: train.loss: Input should be"),
    ("trace.jsonl", ["replicas"], None, None),
]


@pytest.mark.parametrize(("name", "place", "value", "note"), INVALID)
def test_invalid_entry_is_named_and_rest_is_shown(
    folder: Path, name: str, place: list[Any], value: Any, note: str | None
) -> None:
    first, end, rest = (folder / name).read_text().partition("\n" if name.endswith("l") and "json" in name else "\0")
    content = yaml.safe_load(first) if name == "config.yaml" else json.loads(first)
    within = {"content": content}
    for key in (place := ["content", *place])[:-1]:
        within = within[key]
    within[place[-1]] = value
    (folder / name).write_text(json.dumps(content if len(place) > 1 else value) + end + rest)
    text = text_of(folder)
    assert note is None or note in text
    assert "onednn" in text, "the rest is shown"


def test_largest_float64_distance_is_shown(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["divergence"]["path"]["operators"][0]["max_ulp"] = 2**64 - 2**53
    (folder / "report.json").write_text(json.dumps(report))
    assert "1.8e+19 ULP" in text_of(folder)


def test_environment_is_folded(folder: Path) -> None:
    rows = json.loads((folder / "manifest.json").read_text())
    names = [f"package-{i:02}" for i in range(40)]
    for row, version in zip(rows, ("1.0", "2.0"), strict=True):
        row["argv"] = ["train.py", "--name", "a b"]
        row["distributions"] = dict.fromkeys(names, version)
        row["variables"] = {"MKL_CBWR": None, "NCCL_ALGO": "Ring"}
    (folder / "manifest.json").write_text(json.dumps(rows))
    page = text_of(folder)
    assert "train.py --name 'a b'" in page
    assert "40 installed distributions" in page
    assert "variables.NCCL_ALGO" in page
    assert "variables.MKL_CBWR" not in page
    assert "distributions.package-07" in page
    assert "distributions.package-08" not in page
    assert "32 more, digest" in page


@pytest.mark.parametrize("value", [None, 3, [], {}, {"a": None}, [["x"]], {"sha": 1}])
def test_environment_of_any_type_is_shown(folder: Path, value: Any) -> None:
    rows = json.loads((folder / "manifest.json").read_text())
    rows[0] |= dict.fromkeys(("argv", "script", "commit", "distributions", "variables", "packages"), value)
    (folder / "manifest.json").write_text(json.dumps(rows))
    assert "All manifest fields" in text_of(folder)


def test_trace_ends_at_damaged_line(folder: Path) -> None:
    header, *lines = (folder / "trace.jsonl").read_text().splitlines(keepends=True)
    for step in ("-5", "1" * 5000, "1e400", "null", "2"):
        (folder / "trace.jsonl").write_text(header + lines[0] + lines[1].replace("[1,", f"[{step},"))
        run = read_run(folder)
        assert (run.trace.last_step, run.trace.cut) == (0, True)
        (problem,) = (each for each in run.problems if "trace.jsonl" in each)
        assert "is damaged at line 3" in problem


def test_resumed_run_does_not_show_earlier_report(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["run"]["last_step"] == 10
    report["run"]["stopped_after"] = 10
    report["verdict"] |= {"agreed": True, "cause": "none", "summary": "2 replicas, 10 steps: bit-identical; stopped"}
    (folder / "report.json").write_text(json.dumps(report))
    assert "Stopped on request after step 10." in text_of(folder)
    report["run"]["last_step"] = 4
    (folder / "report.json").write_text(json.dumps(report))
    text = text_of(folder)
    assert "Still running, or ended without a report." in text
    assert "report.json is of an earlier attempt" in text


def poisoned(value: Any) -> Any:
    """Append markup to every text."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


def poison(folder: Path) -> None:
    """Add markup to every text of a run's report, manifests and config."""
    for name in ("report.json", "manifest.json"):
        content = poisoned(json.loads((folder / name).read_text()))
        if name == "report.json":
            content["warnings"] = [EVIL]
            content["skipped"] = {"count": 1, "samples": [EVIL]}
        (folder / name).write_text(json.dumps(content))
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + f"\n# {EVIL}\n")


def test_markup_in_values_is_escaped(folder: Path) -> None:
    page = render(read_run(folder))
    before = Text(page)
    poison(folder)
    after = Text(render(read_run(folder)))
    assert after.text.count(EVIL) > 50
    assert after.elements.count("script") == before.elements.count("script") == 1
    assert set(after.elements) == set(before.elements) | {"ul", "li", "details"}
    assert after.attributes == before.attributes


class PageBlocker(nn.Module):
    """A model that creates a folder at the path of the page, once the run folder exists."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = tiny_model(num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        (Path(os.environ["BLOCKED_FOLDER"]) / "full").mkdir(parents=True, exist_ok=True)
        return self.body(inputs)


def test_unwritable_page_does_not_change_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKED_FOLDER", str(tmp_path / "job" / "report.html"))
    arguments = (*SMALL, "--train.max_steps=2", "--model.factory=tests.report.html.test_render:PageBlocker")
    job = run_job(*arguments, root=tmp_path)
    assert job.exitcodes == {}, job.output
    assert job.report["verdict"]["cause"] == "none"
    assert "report.html could not be written" in job.stderr
    assert not [path for path in job.folder.iterdir() if path.suffix == ".tmp"]
