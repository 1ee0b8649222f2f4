"""`Agreement` with a reference on rank 0: all replicas get the same difference."""

import pickle
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dreplica.agreement import protocol
from dreplica.agreement.agreement import Agreement
from dreplica.agreement.reference import Reference, ReferenceDiffers, describe_difference
from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import Stage
from dreplica.state.rng import seed_generators
from tests.agreement.recording import record, stages_of
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
            agreement = Agreement(model, optimizer, trace=trace, recorded=reference, channel=world.channel, **keywords)
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


def reference_of(folder: Path, not_drawn: Collection[str], steps: range = range(4), **keywords: Any) -> Reference:
    with TraceWriter(folder / TRACE_NAME, 1) as trace:
        for step in steps:
            trace.step(step, None, True, drawn_stages(not_drawn), not_drawn=not_drawn)
    return Reference(folder, **keywords)


def drawn_stages(not_drawn: Collection[str], state: bytes = b"a") -> dict[str, Stage]:
    """Return stages whose `rng` holds a constant for each generator that was not drawn from."""
    names = ("python", "numpy", "torch")
    states = b"".join(16 * (b"." if name in not_drawn else state) for name in names)
    return {"weights": Stage(("w",), bytes(16)), "rng": Stage(names, states)}


def test_generator_drawn_from_on_one_side_is_named(tmp_path: Path) -> None:
    reference = reference_of(tmp_path, ["numpy"])
    found = reference.compare(1, False, drawn_stages(["python"]), ["python"])
    assert found is not None
    verdict = describe_difference(found, None, 1)
    assert (verdict.step, verdict.stage) == (1, "rng")
    drawn = [item.text for item in verdict.evidence if item.code == "generator-drawn-one-sided"]
    assert drawn == [
        "NumPy's generator was drawn from only here",
        "Python's generator was drawn from only in the reference",
    ]


@pytest.mark.parametrize("resumed", ["this run", "the reference"])
def test_resumed_side_does_not_know_what_was_drawn(resumed: str, tmp_path: Path) -> None:
    if resumed == "this run":
        reference, not_drawn = reference_of(tmp_path, [], resumed=True), ["python"]
    else:
        reference, not_drawn = reference_of(tmp_path, ["python"], range(2, 6)), []
    assert reference.compare(2, False, drawn_stages(not_drawn), not_drawn) is None
    assert (reference.num_compared, reference.only_samples) == (1, False)
    found = reference.compare(3, False, drawn_stages(not_drawn, b"b") | {"weights": Stage((), b"")}, not_drawn)
    assert found is not None
    assert found.place.differing_stages == ["weights", "rng"]


def test_same_use_of_generators_is_compared_when_resumed(tmp_path: Path) -> None:
    reference = reference_of(tmp_path, ["python"], resumed=True)
    found = reference.compare(2, False, drawn_stages(["python"], b"b"), ["python"])
    assert found is not None
    assert (found.place.stage, found.drawn) == ("rng", {})


def test_damaged_tensors_of_reference_are_evidence(tmp_path: Path) -> None:
    """The ranks wait for each other at this place, so rank 0 does not raise."""
    record(tmp_path / "run", range(4), tensors=True)
    path = tmp_path / "run" / TENSORS_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = Reference(tmp_path / "run").compare(3, False, stages_of(3, [(3, "weights", "one")]))
    assert found is not None
    verdict = describe_difference(found, None, 1)
    assert (verdict.stage, verdict.tensor) == ("weights", None)
    (damaged,) = (item.text for item in verdict.evidence if item.code == "tensors-damaged")
    assert "tensors.bin' is damaged at step 3." in damaged


def test_damaged_reference_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "run", range(4)) / TRACE_NAME
    path.write_bytes(path.read_bytes().replace(b"[2,", b"[3,"))
    with pytest.raises(UsageError, match=r"is damaged at line 4. ") as error:
        Reference(tmp_path / "run")
    assert error.value.code == "damaged-trace"


def test_reference_compares_its_own_coordinate(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / TRACE_NAME, 2, axes=["tp"]) as trace:
        for step in range(3):
            for tp in range(2):
                trace.step(step, None, True, stages_of(step + 10 * tp), coordinate=(tp,))
    for tp in range(2):
        reference = Reference(tmp_path, coordinate=(tp,))
        assert reference.compare(1, False, stages_of(1 + 10 * tp)) is None
        found = reference.compare(2, False, stages_of(2 + 10 * (1 - tp)))
        assert found is not None
        assert reference.num_compared == 1
