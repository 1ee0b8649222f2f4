"""A worker's process, from its first moment."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import dreplica
from dreplica.distributed.signals import ended_once_told, stop_signals
from dreplica.errors import ExitCode
from dreplica.run.process import run_process


def told_to_stop_early() -> ExitCode:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        os.kill(os.getpid(), number)
    with stop_signals() as request:
        return ExitCode.STOPPED if request else ExitCode.FAILED


def in_child(work: Callable[[], ExitCode]) -> int:
    """The exit code of a worker that does `work`."""
    process = os.fork()
    if not process:
        try:
            run_process(work)
        except SystemExit as end:
            os._exit(end.code)  # type: ignore[arg-type]
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def waits_for_nobody() -> ExitCode:
    with ended_once_told(0.2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return ExitCode.AGREED


def comes_in_time() -> ExitCode:
    with ended_once_told(60):
        return told_to_stop_early()


def test_a_signal_before_the_worker_can_stop_is_not_lost_and_does_not_end_it() -> None:
    assert in_child(told_to_stop_early) == ExitCode.STOPPED
    assert in_child(comes_in_time) == ExitCode.STOPPED


def test_one_that_is_told_to_stop_does_not_wait_for_good_for_others_to_join() -> None:
    begun = time.monotonic()
    assert in_child(waits_for_nobody) == ExitCode.FAILED
    assert time.monotonic() - begun < 30


def test_nothing_that_takes_seconds_is_imported_before_signals_are_held() -> None:
    code = "import sys, dreplica.worker; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "False\n"


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for as Linux has it")
@pytest.mark.parametrize("command", ["bench", "burn-in", "flags"])
def test_whatever_it_does_large_tensors_are_put_where_huge_pages_can_be(command: str) -> None:
    code = f"""
import sys
from importlib import import_module
from types import SimpleNamespace
import dreplica.worker as worker

def look(argv):
    import torch
    print(*argv, torch.empty(2**21).data_ptr() % 4096)
    return 0

def imported(name):
    assert callable(import_module(name).work)
    return SimpleNamespace(work=look)

worker.import_module = imported
sys.argv[1:] = [{command!r}, "--steps=3"]
worker.main()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "--steps=3 0\n"


def test_what_the_package_names_is_there() -> None:
    assert [getattr(dreplica, name).__name__ for name in dreplica.__all__] == dreplica.__all__
    with pytest.raises(AttributeError, match="no attribute 'agree'"):
        dreplica.agree  # noqa: B018
