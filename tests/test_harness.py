"""The process that test processes are forked from, and the files that tests make."""

import os
import subprocess
import sys
import tempfile

import pytest

from tests.harness import REPOSITORY, environment

_IMPORT = """
import importlib
import torch
from tests.harness import preloaded

def fail(*_):
    raise AssertionError("CUDA does not work in a fork of a process that has queried it")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = fail
for name in preloaded(on_gpu=True):
    importlib.import_module(name)
"""


def test_preloading_does_not_query_the_gpu() -> None:
    command = [sys.executable, "-c", _IMPORT]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=REPOSITORY, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.process
def test_tests_leave_no_files_behind() -> None:
    tests = [
        "tests/end_to_end/test_main_job.py",
        "tests/library/test_loops.py::test_planted_divergence_stops_all_ranks[transformers]",
    ]
    own = {name: value for name, value in environment().items() if not name.startswith(("PYTEST", "TORCHINDUCTOR"))}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    with tempfile.TemporaryDirectory(dir=os.environ["PYTEST_DEBUG_TEMPROOT"]) as folder:  # tmp_path is too long
        variables = own | {"TMPDIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=variables, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        kept = [name for name in os.listdir(folder) if not name.startswith(("pytest-of-", "torchinductor_"))]
    assert kept == []
    assert "Traceback" not in done.stderr
