"""Test harness for functions on several processes, and for whole jobs."""

import importlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.fixtures import merged

REPOSITORY = Path(__file__).parents[1]


@cache
def temporary_base() -> Path:
    """Return the folder of all temporary files of this process, which is removed when the process ends."""
    base = Path(tempfile.mkdtemp(prefix="dreplica-"))  # short: the path of a Unix socket has at most 107 bytes
    # After multiprocessing has removed its own folder, which has the priority -100.
    Finalize(None, shutil.rmtree, (base,), {"ignore_errors": True}, exitpriority=-200)
    return base


def temporary_folder(prefix: str) -> Path:
    """Return a new folder in `temporary_base`, whose name begins with `prefix`."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=temporary_base()))


def preloaded(on_gpu: bool) -> list[str]:
    """Return the modules to import in the process that all test processes are forked from.

    With a GPU, that process must not even query it: CUDA does not work in a fork of a process that has. Some releases
    of torch query it when they import Inductor.
    """
    compiling = ["torch._dynamo"] if on_gpu else ["torch._dynamo", "torch._inductor.compile_fx"]
    tests_import = ["pytest", "hypothesis"]
    return ["torch", *compiling, *tests_import, "tests.harness", "dreplica.run.run", "tests.preloaded"]


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(preloaded(on_gpu=Path("/dev/nvidiactl").exists()))


def run_replicas(
    body: Callable[..., Any], num_replicas: int, *args: Any, timeout: float = 60.0, imports: Sequence[str] = ()
) -> list[Any]:
    """Run `body(world, *args)` on several gloo processes.

    Args:
        body: A module-level function.
        num_replicas: Number of processes.
        *args: Arguments of `body`, in addition to the world.
        timeout: Seconds until a process is killed.
        imports: Modules that take seconds to import, which are imported once for all processes.

    Returns:
        The result of each process by replica id: what `body` returned, the exception that it raised, or None for a
        process that was killed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, ends = zip(*(_CONTEXT.Pipe(duplex=False) for _ in range(num_replicas)), strict=True)
    rows = [(theirs, body, replica_id, num_replicas, store.port, args) for replica_id, theirs in enumerate(ends)]
    if imports:
        processes = [_CONTEXT.Process(target=_import_and_fork, args=(imports, rows))]
    else:
        processes = [_CONTEXT.Process(target=_enter, args=row, daemon=True) for row in rows]
    for process in processes:
        process.start()
    for theirs in ends:
        theirs.close()
    results = [_receive(pipe, timeout) for pipe in pipes]
    for process in processes:
        process.join(5)
        process.terminate()
        process.join(1)
        process.kill()
    return results


def run_scripts(body: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run `body(rank, *args)` on several processes without a process group, as scripts of a user.

    Returns:
        The result of each process by rank, as `run_replicas` returns it.
    """
    pipes, ends = zip(*(_CONTEXT.Pipe(duplex=False) for _ in range(num_ranks)), strict=True)
    processes = [
        _CONTEXT.Process(target=_enter_script, args=(theirs, body, rank, args)) for rank, theirs in enumerate(ends)
    ]
    for process in processes:
        process.start()
    for theirs in ends:
        theirs.close()
    results = [_receive(pipe, timeout) for pipe in pipes]
    for process in processes:
        process.join(5)
        process.kill()
    return results


def _enter_script(pipe: Connection, body: Callable[..., Any], rank: int, args: Sequence[Any]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send_bytes(pickle.dumps(body(rank, *args)))
    except BaseException as error:
        traceback.print_exc()
        pipe.send_bytes(pickle.dumps(error))
        os._exit(1)


def _import_and_fork(imports: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for name in imports:
        importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_enter, args=row, daemon=True) for row in rows]
    for child in children:
        child.start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which also terminates the children
    for row in rows:
        row[0].close()
    for child in children:
        child.join()


def _enter(
    pipe: Connection, body: Callable[..., Any], replica_id: int, num_replicas: int, port: int, args: Sequence[Any]
) -> None:
    import torch

    from dreplica.distributed.process_group import open_world

    torch.set_num_threads(1)
    os.environ |= _rank_environment(replica_id, num_replicas, port)
    try:
        with open_world(timeout=30) as world:
            result = body(world, *args)
            world.channel.gather(None)
        pipe.send_bytes(pickle.dumps(result))
    except BaseException as error:
        traceback.print_exc()
        pipe.send_bytes(pickle.dumps(error))
        os._exit(1)


def _rank_environment(replica_id: int, num_replicas: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a worker."""
    return {
        "RANK": str(replica_id),
        "WORLD_SIZE": str(num_replicas),
        "LOCAL_RANK": str(replica_id),
        "LOCAL_WORLD_SIZE": str(num_replicas),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent serves the store, which outlives rank 0, as under torchrun
    }


def _receive(pipe: Connection, timeout: float) -> Any:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(timeout) else None
    except EOFError:
        return None


@dataclass(frozen=True)
class Job:
    """A finished job."""

    returncode: int
    """Exit code of torchrun, which is 1 for every failure."""
    exitcodes: dict[int, int]
    """Exit codes of the workers that failed, by rank, negative for a signal."""
    stdout: str
    """Standard output of all workers."""
    stderr: str
    """Standard error of all workers."""
    folder: Path
    """Run folder."""

    @property
    def output(self) -> str:
        """Standard output and standard error."""
        return self.stdout + self.stderr

    @property
    def report(self) -> dict[str, Any]:
        """Content of report.json."""
        return json.loads((self.folder / "report.json").read_text())

    def values(self, part: str, metric: str, epoch: int = -1) -> list[float | None]:
        """Return one value per replica of a metric of `train` or `val`, of the last epoch by default."""
        from dreplica.agreement.trace.run_report import RunReport

        return RunReport.read(self.folder).epochs[epoch].values(part, metric)

    @property
    def trace(self) -> list[str]:
        """Lines of trace.jsonl."""
        return (self.folder / "trace.jsonl").read_text().splitlines()

    @property
    def trace_rows(self) -> list[dict[str, Any]]:
        """Lines of trace.jsonl as JSON values, without the header."""
        from tests.trace_rows import read_rows

        return read_rows(self.folder)[1:]


def torchrun(*arguments: str, num_replicas: int = 2, root: Path | None = None, timeout: float = 120.0) -> Job:
    """Run train.py under torchrun, as the run `job`.

    Args:
        *arguments: `--key=value`, of which a later one replaces an earlier one with the same key.
        num_replicas: Number of workers.
        root: Folder for the run folder, by default a new temporary folder.
        timeout: Seconds until the job is killed and the test fails.
    """
    root = root or temporary_folder("job-")
    command = torchrun_command(*arguments, num_replicas=num_replicas, root=root)
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY, env=environment(), check=False
    )
    return Job(process.returncode, _exitcodes(process.stderr), process.stdout, process.stderr, root / "job")


def run_job(*arguments: str, num_replicas: int = 2, root: Path | None = None, timeout: float = 120.0) -> Job:
    """Run a job as `torchrun` does, with workers forked from a process with torch.

    The workers start in a fraction of a second and do the same as under torchrun, from their command line to their exit
    code. In contrast to torchrun, nothing ends the other workers when one fails.

    Args:
        *arguments: As for `torchrun`.
        num_replicas: Number of workers.
        root: Folder for the run folder, by default a new temporary folder.
        timeout: Seconds until the workers are killed and the test fails.
    """
    root = root or temporary_folder("job-")
    return run_workers([arguments] * num_replicas, root, timeout=timeout)


def run_workers(
    arguments: Sequence[Sequence[str]],
    root: Path,
    rank_0_holds_store: bool = False,
    timeout: float = 120.0,
    launched: Sequence[Mapping[str, str]] | None = None,
) -> Job:
    """Run a job as `run_job` does, with separate arguments for each worker.

    Args:
        arguments: Arguments of each worker, by rank.
        root: Folder for the run folder.
        rank_0_holds_store: True to let rank 0 serve the rendezvous store, as without torchrun. Otherwise this process
            serves it, which outlives the workers.
        timeout: Seconds until the workers are killed and the test fails.
        launched: As for `start_workers`.
    """
    argvs = [_arguments(root, own) for own in arguments]
    processes, _store, outputs = start_workers(argvs, rank_0_holds_store, launched)
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"replicas {hanging} did not end within {timeout} s"
    codes = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    stdout, stderr = (
        "".join(path.read_text() for path in sorted(outputs.glob(f"*.{kind}"))) for kind in ("out", "err")
    )
    return Job(int(bool(codes)), codes, stdout, stderr, root / "job")


def start_workers(
    argvs: Sequence[Sequence[str]],
    rank_0_holds_store: bool = False,
    launched: Sequence[Mapping[str, str]] | None = None,
) -> tuple[list[Any], dist.Store | None, Path]:
    """Start workers without waiting for their end.

    Args:
        argvs: Arguments of each worker, by rank.
        rank_0_holds_store: As for `run_workers`.
        launched: Variables that a launcher other than torchrun sets for each worker, instead of those of torchrun.

    Returns:
        The processes, the rendezvous store, which must live as long as they do, and the folder of their output.
    """
    store = None if rank_0_holds_store else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free_port() if store is None else store.port
    outputs = temporary_folder("output-")
    processes = []
    for rank, argv in enumerate(argvs):
        own = _rank_environment(rank, len(argvs), port) if launched is None else launched[rank]
        variables = environment() | own
        if rank_0_holds_store and launched is None:
            del variables["TORCHELASTIC_USE_AGENT_STORE"]
        processes.append(_CONTEXT.Process(target=_work, args=(argv, rank, outputs, variables)))
        processes[-1].start()
    return processes, store, outputs


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _work(argv: Sequence[str], rank: int, outputs: Path, variables: Mapping[str, str]) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(outputs / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ |= variables
    sys.argv = ["train.py", *argv]
    multiprocessing.set_start_method(None, force=True)  # for data loader workers: Python's default, as under torchrun
    os.chdir(REPOSITORY)

    from dreplica.worker import main

    main()


def environment() -> dict[str, str]:
    """Return the environment of the processes of a job."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


def torchrun_command(*arguments: str, root: Path, num_replicas: int = 2) -> list[str]:
    """Return the command line that `torchrun` runs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_replicas}"]
    return [*launcher, str(REPOSITORY / "train.py"), *_arguments(root, arguments)]


def _arguments(root: Path, arguments: Sequence[str]) -> list[str]:
    return merged(f"--run.root={root}", "--run.name=job", *arguments)


def _exitcodes(stderr: str) -> dict[int, int]:
    """Return the exit codes in torchrun's summary by rank.

    Its lines are `rank : 1 (local_rank: 1)` and `exitcode : 3 (pid: 77)`.
    """
    codes: dict[int, int] = {}
    rank = None
    for line in stderr.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "rank":
            rank = int(value.split("(")[0])
        elif key.strip() == "exitcode" and rank is not None:
            codes[rank] = int(value.split("(")[0])
    return codes
