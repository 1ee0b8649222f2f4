"""Runs recorded by version 0.1, with report.json of schema 1, are still read by the commands."""

import json
import shutil
from pathlib import Path

import pytest

from dreplica.commands import main as cli
from dreplica.report.record.resumable import Completed, NotResumable, check_resumable
from tests.report.page import Text

RUNS = Path(__file__).parent / "schema1"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUNS, tmp_path / "runs"))


def test_report_command_renders_schema_1(runs: Path) -> None:
    assert cli.main(["report", str(runs / "diverged")]) == 0
    text = Text((runs / "diverged" / "report.html").read_text()).text
    assert "Diverged declared-override" in text
    assert "Replicas diverged at step 1 of epoch 1, in the buffers, first in 1.running_mean." in text
    assert "remove the override, or set it for all replicas" in text
    assert "136,784 ULP" in text
    assert "10 steps compared, replicas differ in 10." in text
    assert "invalid entry" not in text
    assert cli.main(["report", str(runs / "agreed")]) == 0
    assert "Agreed 2 replicas, 10 steps: bit-identical." in Text((runs / "agreed" / "report.html").read_text()).text


def test_compare_command_reads_schema_1(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(runs / "agreed"), str(runs / "agreed"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "identical"
    cli.main(["compare", str(runs / "diverged"), str(runs / "agreed"), "--json"])
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("(declared-override)" in note for note in notes)
    assert not any("report.json" in note for note in notes)


def test_resume_reads_schema_1(runs: Path) -> None:
    with pytest.raises(Completed):
        check_resumable(runs / "agreed", "{}", None)
    with pytest.raises(NotResumable, match="declared-override"):
        check_resumable(runs / "diverged", "{}", None)
