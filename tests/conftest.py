"""Layers of tests, and process-wide settings that are restored after each test."""

import getpass
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

from tests.harness import temporary_base
from tests.layers import PROCESS_EVENTS, layer_of

# A shell's background and nohup ignore these signals, and the processes that tests start would, too.
for _number, _handler in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


_LAYERS = ("unit", "process", "job")
_started: list[str] = []
"""Processes that the running test has started, by audit event."""


def _record_started(event: str, arguments: tuple[object, ...]) -> None:
    # git, which a manifest asks for the commit, is over within milliseconds.
    if event in PROCESS_EVENTS and not str(arguments[:1] and arguments[0]).endswith("git"):
        _started.append(f"{event}{arguments[:2]}")


sys.addaudithook(_record_started)


def pytest_configure() -> None:
    """Let this process and all that it starts put temporary files into one folder, which is removed at the end."""
    outside = tempfile.gettempdir()
    # pytest keeps the folders of its last three sessions, and torch the code that it has compiled.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", outside)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(outside, f"torchinductor_{getpass.getuser()}"))
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary_base())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark each test with its layer, unless it is marked already."""
    for item in items:
        if any(item.get_closest_marker(layer) for layer in _LAYERS):
            continue
        fixtures = [found.func for definitions in item._fixtureinfo.name2fixturedefs.values() for found in definitions]
        item.add_marker(layer_of([item.function, *fixtures]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a unit test that starts a process."""
    del _started[:]
    result = yield
    if _started and item.get_closest_marker("unit"):
        pytest.fail(f"a unit test started a process: mark it with pytest.mark.process ({_started[0]})")
    return result


@pytest.fixture(autouse=True)
def restore_logger() -> Iterator[None]:
    """Restore the `dreplica` logger, which a run configures."""
    logger = logging.getLogger("dreplica")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
