"""`Agreement` with a reference on rank 0: all replicas get the same difference."""

import pickle
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dreplica.agreement import protocol
from dreplica.agreement.agreement import Agreement
from dreplica.agreement.reference import Reference, ReferenceDiffers
from dreplica.agreement.trace.reader import TRACE_NAME
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.process_group import World
from dreplica.state.rng import seed_generators
from tests.harness import run_replicas


@dataclass(frozen=True)
class Job:
    """A loop of 6 steps, recorded in `folder` or compared with what is recorded there."""

    folder: Path
    records: bool = False
    every: int = 1
    lag: Literal[0, 1] = 0
    other_at: int | None = None
    """The step from which the weights differ, or None."""
    stop_at: int | None = None
    on_divergence: Literal["stop", "continue"] = "stop"


def loop(world: World, jobs: list[Job]) -> list[Any]:
    return [_loop(world, job) for job in jobs]


def _loop(world: World, job: Job) -> tuple[Verdict | None, int, bool, int | None]:
    """Return the verdict, the steps taken, the stop flag, and the number of comparisons."""
    seed_generators(0)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference, agreement, stop, step = None, None, False, -1
    with ExitStack() as stack:
        trace = None
        if job.records and world.is_coordinator:
            trace = stack.enter_context(TraceWriter(job.folder / TRACE_NAME, 2))
        if not job.records and world.is_coordinator:
            reference = Reference(job.folder)
        keywords: dict[str, Any] = {"lag": job.lag, "every": job.every, "on_divergence": job.on_divergence}
        try:
            agreement = Agreement(model, optimizer, trace=trace, reference=reference, channel=world.channel, **keywords)
            for step in range(1, 7):
                optimizer.zero_grad()
                loss = model(torch.full((3, 2), float(step))).square().mean()
                loss.backward()
                optimizer.step()
                if step == job.other_at:
                    with torch.no_grad():
                        model.weight += 1
                stop = agreement.step(loss=loss, stop=step == job.stop_at and world.replica_id == 1)
            agreement.finish()
        except ReferenceDiffers as difference:
            verdict = pickle.loads(pickle.dumps(difference)).verdict
            return verdict, step, stop, reference and reference.num_compared
    return agreement.divergence, step, stop, reference and reference.num_compared


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("recorded")
    jobs = {
        "recorded": Job(folder, records=True),
        "same": Job(folder),
        "later": Job(folder, lag=1),
        "now and then": Job(folder, every=2),
        "other": Job(folder, other_at=4),
        "other, later": Job(folder, other_at=4, lag=1),
        "other, now and then": Job(folder, other_at=3, every=2),
        "continued": Job(folder, other_at=4, on_divergence="continue"),
        "stopped at the same step": Job(folder, other_at=4, stop_at=4, on_divergence="continue"),
    }
    rows = run_replicas(loop, 2, list(jobs.values()))
    return {name: [row[number] for row in rows] for number, name in enumerate(jobs)}


@pytest.mark.parametrize(("name", "compared"), [("same", 7), ("later", 7), ("now and then", 4)])
def test_reference_equals_same_run(name: str, compared: int, results: dict[str, list[Any]]) -> None:
    assert results[name] == [(None, 6, False, compared), (None, 6, False, None)]


@pytest.mark.parametrize(
    ("name", "at", "steps"), [("other", 4, 4), ("other, later", 4, 5), ("other, now and then", 4, 4)]
)
def test_all_replicas_raise_same_verdict_at_same_step(
    name: str, at: int, steps: int, results: dict[str, list[Any]]
) -> None:
    (verdict, *_), (other, *_) = results[name]
    assert verdict == other
    stage = "output" if name == "other, now and then" else "weights"
    assert (verdict.agreed, verdict.step, verdict.stage, verdict.groups) == (False, at, stage, [[0, 1]])
    assert [row[1] for row in results[name]] == [steps, steps]


@pytest.mark.parametrize("name", ["continued", "stopped at the same step"])
def test_continue_keeps_first_difference_and_stop_flag(name: str, results: dict[str, list[Any]]) -> None:
    for verdict, steps, stop, _ in results[name]:
        assert (verdict.step, verdict.stage, steps) == (4, "weights", 6)
        assert stop is (name == "stopped at the same step")


def test_difference_on_rank_0_is_in_the_step_message() -> None:
    words = bytes(range(16)), bytes(range(16))
    for differs in (False, True):
        for stop in (False, True):
            messages = [protocol.message(words[0], False, differs), protocol.message(words[1], stop)]
            outcome = protocol.outcome(torch.stack(messages).amax(0))
            assert (outcome.agreed, outcome.differs_from_reference) == (True, differs)
            assert outcome.stop is (stop and not differs), "which is sent again with the next message"
    assert protocol.message(words[0], True, True).nbytes == protocol.MESSAGE_BYTES
