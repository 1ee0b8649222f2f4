"""What the kernel says, and what follows from it."""

import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dreplica.commands.doctor.machine import (
    check_descriptors,
    check_disk,
    check_memory_errors,
    check_shared_memory,
    check_threads,
)

_GIB = 2**30


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Eight CPUs, eight threads, no limit, nothing set."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_DYNAMIC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("dreplica.commands.doctor.machine.cpu_limit", lambda: None)
    return monkeypatch


def test_threads_changed_by_torchrun_warn(machine: pytest.MonkeyPatch) -> None:
    check = check_threads("step 1, gradients, 0.weight")
    assert check.status == "warn"
    assert "8 by default on 8 CPUs, and 1 under torchrun" in check.seen
    assert "8 threads and 1 thread diverge at step 1, gradients, 0.weight" in check.why
    assert "export OMP_NUM_THREADS=1" in check.remedy


def test_fixed_threads_are_ok(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("OMP_NUM_THREADS", "8")
    assert check_threads().status == "ok"


def test_single_thread_is_ok(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch, "get_num_threads", lambda: 1)
    assert check_threads().status == "ok"


def test_threads_beyond_cgroup_limit_warn(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("OMP_NUM_THREADS", "8")
    machine.setattr("dreplica.commands.doctor.machine.cpu_limit", lambda: 2.5)
    check = check_threads()
    assert check.status == "warn"
    assert "of which a cgroup grants 2.5" in check.seen
    assert "export OMP_NUM_THREADS=2" in check.remedy


def test_dynamic_threads_warn(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("OMP_NUM_THREADS", "8")
    machine.setenv("OMP_DYNAMIC", "TRUE")
    check = check_threads()
    assert check.status == "warn"
    assert "can hang" in check.why
    assert "unset OMP_DYNAMIC" in check.remedy


def _with_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(0, 0, num_bytes))


@pytest.mark.parametrize(("free", "status"), [(64 * 2**20, "warn"), (8 * _GIB, "ok")])
def test_shared_memory(free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_free(monkeypatch, free)
    check = check_shared_memory(tmp_path)
    assert check.status == status
    assert bool(check.remedy) == (status == "warn")
    assert check_shared_memory(tmp_path / "absent").status == "bad"


@pytest.mark.parametrize(("free", "status"), [(10 * 2**20, "bad"), (_GIB, "warn"), (50 * _GIB, "ok")])
def test_disk(free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_free(monkeypatch, free)
    assert check_disk(tmp_path).status == status


@pytest.mark.parametrize(
    ("limits", "status", "remedy"),
    [
        ((1024, 65536), "warn", ("ulimit -n 4096",)),
        ((1024, resource.RLIM_INFINITY), "warn", ("ulimit -n 4096",)),
        ((65536, 65536), "ok", ()),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", ()),
    ],
)
def test_open_files(limits: Any, status: str, remedy: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    check = check_descriptors()
    assert (check.status, check.remedy) == (status, remedy)


def test_hard_limit_on_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 1024))
    (remedy,) = check_descriptors().remedy
    assert remedy.startswith("docker run --ulimit")


@pytest.mark.parametrize(
    ("counts", "status"),
    [([], "unknown"), ([(0, 0)], "ok"), ([(0, 0), (3, 0)], "warn"), ([(3, 0), (0, 1)], "bad")],
)
def test_memory_errors(counts: list[tuple[int, int]], status: str, tmp_path: Path) -> None:
    for number, (corrected, uncorrected) in enumerate(counts):
        folder = tmp_path / f"mc{number}"
        folder.mkdir()
        (folder / "ce_count").write_text(f"{corrected}\n")
        (folder / "ue_count").write_text(f"{uncorrected}\n")
    assert check_memory_errors(tmp_path).status == status
