"""A custom training loop alone, under torchrun, and under srun and mpirun: the right line each time."""

import os
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.harness import _CONTEXT, free_port
from tests.launch.test_launchers import LAUNCHERS, srun

LOOP = Path(__file__).with_name("loop.py")


def run_loops(folder: Path, launched: Sequence[Mapping[str, str]], *arguments: str) -> tuple[list[int | None], str]:
    """Run the loop in one process for each mapping of variables. Return the exit codes and what they print."""
    logs = [folder / f"{rank}.log" for rank in range(len(launched))]
    rows = zip(logs, launched, strict=True)
    processes = [_CONTEXT.Process(target=_run, args=(log, dict(own), arguments)) for log, own in rows]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes, "".join(log.read_text() for log in logs)


def _run(log: Path, variables: Mapping[str, str], arguments: Sequence[str]) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ |= variables
    sys.argv = [str(LOOP), *arguments]
    try:
        runpy.run_path(str(LOOP), run_name="__main__")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def test_loop_alone_says_that_nothing_was_compared(tmp_path: Path) -> None:
    codes, printed = run_loops(tmp_path, [{}])
    assert codes == [0], printed
    assert "NOT COMPARED 3 steps: this process is alone." in printed
    assert "AGREED" not in printed


@pytest.mark.parametrize("variables", [{}, srun(0) | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_loop_alone_says_what_it_recorded(variables: dict[str, str], tmp_path: Path) -> None:
    codes, printed = run_loops(tmp_path, [variables], str(tmp_path / "a"))
    assert codes == [0], printed
    assert f"RECORDED 3 steps in {tmp_path}/a: batch, " in printed


@pytest.mark.parametrize("has_address", [False, True])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_loop_of_several_processes_needs_a_process_group(
    launcher: Callable[[int], Mapping[str, str]], has_address: bool, tmp_path: Path
) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())} if has_address else {}
    codes, printed = run_loops(tmp_path, [{**launcher(rank), **address} for rank in range(2)], str(tmp_path / "a"))
    assert codes == [1, 1], printed
    assert printed.count("dreplica.errors.UsageError: ") == 2
    assert printed.count(" but there is no process group, so nothing would be compared. Call torch.distr") == 2
    for word in ("AGREED", "RECORDED", "COMPARED"):
        assert word not in printed
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("recorded", [False, True])
def test_loop_with_a_process_group_agrees(recorded: bool, tmp_path: Path) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "INITIALIZE": "1"}
    launched = [{"RANK": str(rank), "WORLD_SIZE": "2", **address} for rank in range(2)]
    codes, printed = run_loops(tmp_path, launched, *([str(tmp_path / "a")] if recorded else []))
    assert codes == [0, 0], printed
    assert printed.count("AGREED 2 ranks, 3 steps: batch, ") == 1
