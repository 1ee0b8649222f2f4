"""Workers started without torchrun, as a scheduler may: each with its own arguments, rank 0 holding the store."""

import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.fixtures import SMALL
from tests.harness import REPOSITORY, Job, environment


@dataclass(frozen=True)
class Ended:
    """A worker that has ended."""

    returncode: int
    stdout: str
    stderr: str


def by_hand(*arguments: list[str], seconds: float = 60.0) -> list[Ended]:
    """A worker for each list of arguments, which are laid over those of a small job; killed after `seconds`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank, own in enumerate(arguments):
        variables = environment() | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(arguments)),
            "LOCAL_WORLD_SIZE": str(len(arguments)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        given = {token.split("=", 1)[0]: token for token in (*SMALL, *own)}
        workers.append(
            subprocess.Popen(
                [sys.executable, str(REPOSITORY / "train.py"), *given.values()],
                env=variables,
                cwd=REPOSITORY,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        outputs = [worker.communicate(timeout=seconds) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [Ended(worker.returncode, *output) for worker, output in zip(workers, outputs, strict=True)]


def job_of(ended: list[Ended], root: Path) -> Job:
    """All of them as one job whose run folder is `root`/job."""
    stdout, stderr = "".join(worker.stdout for worker in ended), "".join(worker.stderr for worker in ended)
    exitcodes = {rank: worker.returncode for rank, worker in enumerate(ended)}
    return Job(max(exitcodes.values()), exitcodes, stdout, stderr, root / "job")
