"""A custom training loop that loses a rank: the others name it, and all processes end."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.harness import REPOSITORY, environment
from tests.library import lost_ranks

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("lost ranks")]

JOBS = {
    # What happens to which rank: the reason code, and the longest time until the others name it.
    "killed-1": ("no-response", 15),
    "raises-2": ("raised", 15),
    "exits-1": ("ended", 15),
    "vanishes-2": ("no-response", 15),
    "stopped-1": ("no-response", 15),
    "loops-2": ("hung", 15),
    "killed-0": ("store-lost", 15),  # rank 0 serves the store
    "stopped-0": ("store-no-response", 15),
    "raises-0": ("raised", 15),
}
LATE_SECONDS = 10.0
"""Seconds that a busy machine may add."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the exit code, the time of the end and the output of each rank of each job."""
    folder = tmp_path_factory.mktemp("lost")
    jobs = [*JOBS, "uneven-1", "unfinished-0", "forks-1", "diverges-1"]
    command = [sys.executable, "-m", "tests.library.lost_ranks", str(folder), *jobs]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=170, cwd=REPOSITORY, env=environment(), check=False
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    return {job: {int(rank): row for rank, row in ranks.items()} for job, ranks in found.items()}


def data_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a rank has printed as JSON."""
    return json.loads(next(line for line in row["output"].splitlines() if line.startswith("{")))


@pytest.mark.parametrize("job", JOBS)
def test_survivors_name_the_lost_rank(job: str, rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    lost, (code, seconds) = int(job.rpartition("-")[2]), JOBS[job]
    for rank in {0, 1, 2} - {lost}:
        found = data_of(rows[job][rank])
        (item,) = found["lost"]
        assert (item["replica_id"], item["code"]) == (lost, code), found
        assert found["seconds"] < seconds + LATE_SECONDS
        assert f"replica {lost}: {item['reason']}" in found["text"]
        assert f"noticed by replica {rank} at step {lost_ranks.LAST}: " in found["text"]
        if not code.startswith("store"):
            assert item["step"] == lost_ranks.LAST - 1
            assert f"after step {lost_ranks.LAST - 1}" in found["text"]
        assert rows[job][rank]["code"] == 1  # the traceback ends it, and nothing keeps it


def test_looping_rank_is_named_with_its_stack(rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    for rank in (0, 1):
        (item,) = data_of(rows["loops-2"][rank])["lost"]
        assert [line.rpartition(" in ")[2] for line in item["stack"][-2:]] == ["train", "load_forever"]
        assert item["stack"][-1].startswith("tests/library/lost_ranks.py:")
        assert f"stack of replica 2, innermost last:\n  {item['stack'][0]}\n" in data_of(rows["loops-2"][rank])["text"]
        assert item["reason"].startswith(f"hangs after step 3 at {item['stack'][-1]}: ")


def test_stopped_rank_is_named_with_its_silence(rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    for rank in (0, 2):
        (item,) = data_of(rows["stopped-1"][rank])["lost"]
        assert 6 < item["silent"] < 15 + LATE_SECONDS
        assert item["reason"].startswith(f"no heartbeat for {item['silent']:.0f} s: ")


@pytest.mark.parametrize(("job", "text"), [("loops-2", "after step 3, last heartbeat "), ("stopped-1", "no heartbeat")])
def test_waiting_rank_says_for_whom(job: str, text: str, rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    lost = int(job[-1])
    lines = [line for row in rows[job].values() for line in row["output"].splitlines() if "waiting for" in line]
    assert len(lines) == 1
    assert f"waiting for replica {lost} ({text}" in lines[0]
    assert lines[0].endswith(" s at step 4")


def test_store_that_does_not_respond_is_said(rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    for rank in (1, 2):
        assert "s for the rendezvous store, which replica 0 serves" in rows["stopped-0"][rank]["output"]


def test_rank_with_fewer_batches_is_named_with_its_steps(rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Rank 1 has finished. The others wait for it in the backward pass of DistributedDataParallel."""
    first = "replica 1 finished after 4 steps and waits in finish()\nreplicas 0, 2: hangs after step 4 at "
    found = data_of(rows["uneven-1"][1])
    assert found["text"].startswith(f"{first}tests/library/lost_ranks.py:")
    assert "stack of replicas 0, 2, innermost last:\n" in found["text"]
    for rank in (0, 2):
        output = rows["uneven-1"][rank]["output"]
        assert f"a replica was lost:\n{first}" in output  # before the error of the user's collective
        assert rows["uneven-1"][rank]["code"] == 1


def test_healthy_script_without_finish_ends_silently(rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    for row in rows["unfinished-0"].values():
        assert row["code"] == 0
        assert row["output"] == "trained\n"


def test_script_that_catches_a_divergence_ends_normally(rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Its interpreter ends while the liveness thread finds that the process group is gone."""
    for row in rows["diverges-1"].values():
        assert row["code"] == 0, row["output"]
        assert row["output"].endswith("diverged\n")


def test_forked_process_ends_without_disturbing_its_parent(rows: dict[str, dict[int, dict[str, Any]]]) -> None:
    for row in rows["forks-1"].values():
        assert row["code"] == 0
        assert row["output"].endswith("trained\n")
        assert "ReplicaLost" not in row["output"]
