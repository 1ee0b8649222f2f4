"""The process that test processes are forked from."""

import subprocess
import sys

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
