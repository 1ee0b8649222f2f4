"""The process of a worker, from its start."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import dreplica
from dreplica.distributed.signals import exit_after_signal, stop_signals
from dreplica.errors import ExitCode
from dreplica.run.process import run_process


def stop_early() -> ExitCode:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        os.kill(os.getpid(), number)
    with stop_signals() as request:
        return ExitCode.STOPPED if request else ExitCode.FAILED


def in_child(work: Callable[[], ExitCode]) -> int:
    """Return the exit code of a worker that runs `work`."""
    process = os.fork()
    if not process:
        try:
            run_process(work)
        except SystemExit as end:
            os._exit(end.code)  # type: ignore[arg-type]
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_after_signal() -> ExitCode:
    with exit_after_signal(0.2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return ExitCode.AGREED


def stop_in_time() -> ExitCode:
    with exit_after_signal(60):
        return stop_early()


def test_early_signal_is_handled_later() -> None:
    assert in_child(stop_early) == ExitCode.STOPPED
    assert in_child(stop_in_time) == ExitCode.STOPPED


def test_wait_for_other_processes_ends_after_a_signal(capfd: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    assert in_child(wait_after_signal) == ExitCode.FAILED
    assert time.monotonic() - begun < 30
    assert capfd.readouterr().err == "error: ended by SIGTERM while waiting for other replicas\n"


def test_signals_are_blocked_before_slow_imports() -> None:
    for module in (
        "dreplica.worker",
        *(f"dreplica.commands.{name}.__main__" for name in ("bench", "burn_in", "flags")),
    ):
        code = f"import sys, {module}; print('torch' in sys.modules)"
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert process.stdout == "False\n", module


def quiet() -> ExitCode:
    return ExitCode.AGREED if os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR" else ExitCode.FAILED


def test_process_silences_c10d_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    assert in_child(quiet) == ExitCode.AGREED
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert in_child(quiet) == ExitCode.FAILED


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for as Linux has it")
@pytest.mark.parametrize("package", ["bench", "burn_in", "flags"])
def test_worker_aligns_large_tensors(package: str) -> None:
    """Every worker process allocates large tensors where huge pages are possible."""
    module = {"flags": "trial"}.get(package, "worker")
    code = f"""
import runpy, sys
from types import ModuleType

def look(argv):
    import torch
    print(*argv, torch.empty(2**21).data_ptr() % 4096)
    return 0

fake = sys.modules["dreplica.commands.{package}.{module}"] = ModuleType("fake")
fake.work = look
sys.argv[1:] = ["--steps=3"]
runpy.run_module("dreplica.commands.{package}", run_name="__main__")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "--steps=3 0\n", process.stderr


def test_package_has_the_names_in_all() -> None:
    names = [name for name in dreplica.__all__ if name != "__version__"]
    assert [getattr(dreplica, name).__name__ for name in names] == names
    assert isinstance(dreplica.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'agree'"):
        dreplica.agree  # noqa: B018
