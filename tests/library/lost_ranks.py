"""A custom training loop in which one rank is lost, run by a process that forks the ranks of several such jobs.

`python -m tests.library.lost_ranks FOLDER JOB...`, where a job is a name such as `killed-1`: what happens, and to which
rank. The forks save the seconds that it takes to import torch. Their interpreters end as those of any script.
Prints for each job and rank its exit code, the time of its end and its output, as JSON.
"""

import gc
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch._dynamo  # by torch.optim, in the first step
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dreplica

dreplica.Agreement(nn.Linear(1, 1)).close()  # imports what it needs

NUM_RANKS = 3
LIMIT = 75.0
"""Seconds until the ranks that have not ended are killed, less than gloo's timeout."""
NUM_STEPS = 5
LAST = 4
"""The step at which the rank is lost."""


def load_forever() -> None:
    """Loop forever, as a data loader that waits for a file does."""
    while True:
        time.sleep(0.01)


def fail() -> None:
    """Raise an exception that no caller handles."""
    raise ValueError("bad batch")


def fork_and_exit() -> None:
    """Fork a process that ends as any other, and wait for it."""
    child = os.fork()
    if child == 0:
        sys.exit(0)
    began = time.monotonic()
    status = os.waitpid(child, 0)[1]
    assert status == 0
    assert time.monotonic() - began < LIMIT / 2


FAULTS: dict[str, Callable[[], Any]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": fail,
    "loops": load_forever,
    "exits": lambda: sys.exit(0),
    "vanishes": lambda: os._exit(0),
    "forks": fork_and_exit,
}


def train(how: str, lost: int) -> None:
    """Train, and lose this rank if it is `lost`."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    model: nn.Module = nn.Linear(8, 3)
    if how == "uneven":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loses_none = how in ("unfinished", "forks", "diverges")
    timeout = 60 if loses_none else 10  # however busy the machine is
    agreement = dreplica.Agreement(model, optimizer, timeout=timeout)
    num_steps = NUM_STEPS - 1 if how == "uneven" and rank == lost else NUM_STEPS
    reached = time.time()
    try:
        for step in range(1, num_steps + 1):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 8)).sum()
            loss.backward()
            optimizer.step()
            reached = time.time()
            if step == LAST and rank == lost and how == "diverges":
                model.weight.data += 1
            if step == LAST and rank == lost and how in FAULTS:
                print(json.dumps({"at": reached}), flush=True)
                FAULTS[how]()
            agreement.step(loss=loss)
        if how != "unfinished":
            agreement.finish()
        print("trained", flush=True)
    except dreplica.Divergence:
        print("diverged", flush=True)
        dist.destroy_process_group()
    except dreplica.ReplicaLost as error:
        row = {"rank": rank, "seconds": time.time() - reached, "text": str(error), "code": error.code}
        print(json.dumps(row | {"lost": [item.as_dict() for item in error.lost]}), flush=True)
        raise


def main() -> None:
    """Fork the ranks of all jobs and wait for them."""
    folder, *jobs = sys.argv[1:]
    gc.freeze()  # so that the interpreters of the ranks end sooner
    running: dict[int, tuple[str, int]] = {}
    for job in jobs:
        port = free_port()
        for rank in range(NUM_RANKS):
            child = os.fork()
            if child == 0:
                be_rank(folder, job, rank, port)
                return
            running[child] = job, rank
    rows: dict[str, dict[int, dict[str, Any]]] = {job: {} for job in jobs}
    end = time.monotonic() + LIMIT
    while running and time.monotonic() < end:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            time.sleep(0.05)
            continue
        job, rank = running.pop(child)
        rows[job][rank] = {"code": os.waitstatus_to_exitcode(status), "ended": time.time()}
        remaining = [(pid, each) for pid, (other, each) in running.items() if other == job]
        if [each for _, each in remaining] == [int(job.rpartition("-")[2])]:
            time.sleep(0.5)  # the survivors have ended
            os.kill(remaining[0][0], signal.SIGKILL)
    for child, (job, rank) in running.items():
        os.kill(child, signal.SIGKILL)
        rows[job][rank] = {"code": None, "ended": None}
    for job, ranks in rows.items():
        for rank, row in ranks.items():
            with open(os.path.join(folder, f"{job}.{rank}")) as file:
                row["output"] = file.read()
    print(json.dumps(rows))


def be_rank(folder: str, job: str, rank: int, port: int) -> None:
    """Run one rank of a job in this process, whose output goes to a file."""
    output = os.open(os.path.join(folder, f"{job}.{rank}"), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC_", "LOCAL_"))]:
        del os.environ[name]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(NUM_RANKS),
    }
    torch.set_num_threads(1)
    how, _, lost = job.rpartition("-")
    train(how, int(lost))


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    main()
