"""The record of a run before its first step."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dreplica.config.schema import ReportConfig, RunFolderConfig
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.report.record.recorder import Recorder


def manifest(host: str, uuid: str | None) -> dict[str, Any]:
    gpu = {"type": "cuda", "name": "NVIDIA H200", "uuid": uuid}
    return {"host": host, "seed": 42, "data": "", "device": gpu if uuid else {"type": "cpu", "name": "cpu"}}


@pytest.mark.parametrize(
    ("cards", "warned"),
    [
        ([("a", "1"), ("a", "1")], True),
        ([("a", "1"), ("a", "2"), ("b", "3"), ("a", "2")], True),
        ([("a", "1"), ("a", "2")], False),
        ([("a", None), ("a", None)], False),
    ],
)
def test_recorder_warns_of_shared_gpu_by_uuid(
    cards: list[tuple[str, str | None]], warned: bool, tmp_path: Path
) -> None:
    world = World(0, 1, Channel(), None, "a")
    config = RunFolderConfig(name="job", root=str(tmp_path))
    recorder = Recorder(world, Console(quiet=True), config, "job", "identical", "{}", ReportConfig())
    recorder.open([manifest(*card) for card in cards])
    assert recorder.report is not None
    assert any("share a GPU" in warning for warning in recorder.report.warnings) == warned


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, []),
        ({"argv": ["train.py", "--run.resume=auto"]}, []),
        ({"commit": {"sha": "b" * 40, "dirty": False, "diff": None}}, ["commit was 'aaaaaaaaaaaa' before"]),
        (
            {"distributions": {f"package-{i:02}": "2" for i in range(30)}},
            [*(f"distributions.package-{i:02} was '1' before" for i in range(10)), "distributions was '20 more that"],
        ),
        ({"host": "b"}, ["host was 'a' before the interruption, and is 'b' now"]),
    ],
)
def test_recorder_warns_of_another_environment(
    changes: dict[str, Any], warnings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = manifest("a", None) | {
        "argv": ["train.py"],
        "commit": {"sha": "a" * 40, "dirty": False, "diff": None},
        "distributions": {f"package-{i:02}": "1" for i in range(30)},
    }
    world = World(0, 1, Channel(), None, "a")
    config = RunFolderConfig(name="job", root=str(tmp_path))
    recorder = Recorder(world, Console(quiet=True), config, "job", "identical", "{}", ReportConfig())
    recorder.open([before])
    recorder._compare_manifests([before | changes])
    assert recorder.report is not None
    found = recorder.report.warnings
    assert len(found) == len(warnings)
    assert all(line.startswith(text) for line, text in zip(found, warnings, strict=True)), found
    (tmp_path / "job" / "manifest.json").write_text("[3]")
    recorder._compare_manifests([before])
    assert "is not the file of a run" in caplog.text
