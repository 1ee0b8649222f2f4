"""Start scripts in forks of interpreters that have imported torch, which takes a tenth of the time of a new one.

Two interpreters have different hash seeds, as two processes that a user starts.
"""

import functools
import importlib
import json
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.harness import REPOSITORY, environment

SCRIPTS = Path(__file__).parent / "scripts"
_SECONDS = 60


class Interpreter:
    """A Python process that runs scripts in forks of itself.

    Args:
        hash_seed: Hash seed of the process. It is fixed so that orders of sets differ in every run of the tests.
    """

    def __init__(self, hash_seed: int) -> None:
        variables = environment() | {"PYTHONHASHSEED": str(hash_seed)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.library.two_runs.runs"],
            cwd=REPOSITORY,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, name: str, work: Path, output: str, library: str | None = None, reference: str | None = None
    ) -> dict[str, Any] | None:
        """Run `python scripts/<name>.py OUTPUT` and check that it ends without an error, or with a `Divergence`.

        Args:
            name: Name of the script.
            work: Folder in which it is started.
            output: Its argument, the run folder to write, relative to `work`.
            library: Folder in `work` that PYTHONPATH begins with.
            reference: Run folder that the script's `Agreement` compares with, as if it passed `reference=`.

        Returns:
            The verdict of a `Divergence` as JSON values, or None.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, str(work), output, library, reference]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer == "0\n", f"{name}: exit code {answer}{_log(work, output).read_text()}"
        verdict = work / output / "verdict.json"
        return json.loads(verdict.read_text()) if verdict.exists() else None

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # which has no work left, and takes a second to end otherwise
        self._process.communicate()


def _serve() -> None:
    """Run the scripts named on standard input, and print their exit codes."""
    for name in ("torch._dynamo", "torch.optim.swa_utils", "dreplica.agreement.agreement"):
        importlib.import_module(name)  # once, for all scripts
    os.environ.pop("PYTHONHASHSEED")  # as in a process of a user, who does not set it
    for line in sys.stdin:
        child = multiprocessing.get_context("fork").Process(target=_run, args=json.loads(line))
        child.start()
        child.join(_SECONDS)
        child.kill()
        child.join()
        print(child.exitcode, flush=True)


def _run(name: str, folder: str, output: str, library: str | None, reference: str | None) -> None:
    import numpy
    import torch

    import dreplica

    work, script = Path(folder), str(SCRIPTS / f"{name}.py")
    log = os.open(_log(work, output), os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.chdir(work)
    torch.set_num_threads(1)
    random.seed(), numpy.random.seed(), torch.seed()  # as in a new interpreter, and not as in the parent
    sys.argv, sys.path[0] = [script, output], str(SCRIPTS)
    if library is not None:
        sys.path.insert(1, str(work / library))
    if reference is not None:
        dreplica.Agreement = functools.partial(dreplica.Agreement, reference=reference)  # type: ignore[misc]
    try:
        runpy.run_path(script, run_name="__main__")
    except dreplica.Divergence as divergence:
        (work / output / "verdict.json").write_text(json.dumps(divergence.verdict.as_dict()))


def _log(work: Path, output: str) -> Path:
    return work / f"{output.replace('/', '-')}.log"


if __name__ == "__main__":
    _serve()
