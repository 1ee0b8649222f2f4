"""Memory, CPU limits and GPUs as this machine reports them."""

from pathlib import Path

import pytest

from dreplica.environment import hardware


def test_available_memory_includes_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        "meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\n",
        "memory.max": "40000\n",
        "memory.current": "30000\n",
        "memory.stat": "anon 5000\nactive_file 10000\ninactive_file 2000\n",
    }
    monkeypatch.setattr(hardware, "Path", lambda path: tmp_path / ("meminfo" if "meminfo" in path else ""))
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    assert hardware.available_memory() == 40000 - 30000 + 12000
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.available_memory() == 50 * 1024
    (tmp_path / "memory.max").unlink()
    assert hardware.available_memory() == 50 * 1024


@pytest.mark.parametrize(
    ("files", "own", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 2.0),
        ({"cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"}, "", 0.5),
        ({"cpu,cpuacct/x/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"}, "", None),
        ({}, "8:pids:/\n", None),
    ],
)
def test_cpu_limit_is_the_cgroups_quota(files: dict[str, str], own: str, limit: float | None, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    listed = tmp_path / "self"
    listed.write_text(own or "4:cpu,cpuacct:/x\n3:pids:/\n")
    assert hardware.cpu_limit(root, listed) == limit


def fake_nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.process
def test_nvidia_smi_rows_have_the_fields_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvidia_smi(monkeypatch, tmp_path, "echo '0, NVIDIA H200'; echo '1, [N/A]'")
    rows = hardware.ask_nvidia_smi(("index", "name"))
    assert rows == [{"index": "0", "name": "NVIDIA H200"}, {"index": "1", "name": "[N/A]"}]


@pytest.mark.process
def test_nvidia_smi_failure_is_returned_as_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvidia_smi(monkeypatch, tmp_path, "echo no driver; exit 9")
    assert hardware.ask_nvidia_smi() == "nvidia-smi: no driver"
    monkeypatch.setenv("PATH", "")
    assert hardware.ask_nvidia_smi() == "nvidia-smi is not installed"


@pytest.mark.parametrize(("size", "text"), [(1.5e9, "1.5 GB"), (1e5, "0.1 MB")])
def test_spell_size_rounds_to_one_digit(size: float, text: str) -> None:
    assert hardware.spell_size(size) == text
