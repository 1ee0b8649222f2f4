"""`Agreement` on gloo processes: no verdict if nothing differs, the exact place if one bit does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from tests.agreement.bodies import TENSOR, Fault, Job, Result, seed_everything, train_all
from tests.harness import run_replicas

CAUSE = {
    "indices": "indices-differ",
    "batch": "batch-differs",
    "predictions": "evaluation-differs",
}


def run_jobs(jobs: Sequence[Job], num_replicas: int) -> list[list[Result]]:
    """Return the results of each job, by replica."""
    rows = run_replicas(train_all, num_replicas, jobs)
    assert all(isinstance(row, list) for row in rows), rows
    return [list(results) for results in zip(*rows, strict=True)]


def run_job(job: Job, num_replicas: int) -> list[Result]:
    (results,) = run_jobs([job], num_replicas)
    return results


def one_verdict(results: Sequence[Result]) -> Verdict:
    """Return the verdict, which all replicas must share."""
    verdicts = [result.verdict for result in results]
    assert verdicts[0] is not None
    assert all(verdict == verdicts[0] for verdict in verdicts)
    return verdicts[0]


# Agreement


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
def test_equal_replicas_agree(num_replicas: int) -> None:
    jobs = [Job(lag=lag, every=every, evaluate_after=4) for lag in (0, 1) for every in (1, 3)]
    jobs.append(Job(expect="independent", distinct=True, lag=1))
    for job, results in zip(jobs, run_jobs(jobs, num_replicas), strict=True):
        # every 3: step 3, and the final state
        expected = Result(None, False, steps_done=4, steps_checked=4 if job.every == 1 else 2, stops=[False] * 4)
        assert results == [expected] * num_replicas


# A planted fault

# replicas at fault, step, lag: in mid-run, and at the last step before `finish`
PLACES = [((0,), 2, 0), ((2,), 4, 0), ((1,), 2, 1), ((0,), 4, 1)]
FAULTS = {
    f"{stage}, step {step}, lag {lag}": Job(
        faults=(Fault(replicas, step, stage),), lag=lag, evaluate_after=step if stage == "predictions" else None
    )
    for stage in TENSOR
    for replicas, step, lag in PLACES
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[Result]]:
    """Return the results of three replicas for each job."""
    return dict(zip(FAULTS, run_jobs(list(FAULTS.values()), 3), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_flipped_bit_in_any_stage_is_found_at_its_step(name: str, found: dict[str, list[Result]]) -> None:
    job, results = FAULTS[name], found[name]
    (fault,) = job.faults
    (culprit,) = fault.replicas
    verdict = one_verdict(results)
    assert (verdict.step, verdict.epoch, verdict.stage, verdict.tensor) == (
        fault.step,
        1,
        fault.stage,
        TENSOR[fault.stage],
    )
    assert verdict.suspects == [culprit]
    assert verdict.groups == [[replica for replica in range(3) if replica != culprit], [culprit]]
    cause = CAUSE.get(fault.stage, "unexplained")
    if fault.stage == "rng" and (not job.lag or fault.step == job.steps):  # otherwise the states are a later step's
        cause = "generators-differ"
    assert verdict.cause == cause
    assert verdict.module == (TENSOR[fault.stage].split(".")[0] if fault.stage in MODULES else None)
    assert verdict.evidence[0].data["num_differing"] == 1
    # With lag the comparison completes in the next step, an evaluation's at once, and the last step's in `finish`.
    late = job.lag == 1 and fault.stage != "predictions" and fault.step < job.steps
    assert all(result.raised and result.steps_done == fault.step + late for result in results)


MODULES = ("buffers", "gradients", "weights")


def test_difference_at_build_is_found_at_step_0() -> None:
    for results in run_jobs([Job(faults=(Fault((1,), 0, "weights"),), lag=lag) for lag in (0, 1)], 3):
        verdict = one_verdict(results)
        assert (verdict.step, verdict.stage, verdict.tensor, verdict.suspects) == (0, "weights", "5.bias", [1])
        assert [result.steps_done for result in results] == [-1] * 3


def test_suspects_need_a_majority_of_four_replicas() -> None:
    even, odd = run_jobs([Job(faults=(Fault(replicas, 2, "weights"),)) for replicas in ((0, 3), (2,))], 4)
    assert (one_verdict(even).groups, one_verdict(even).suspects) == ([[0, 3], [1, 2]], [])
    assert (one_verdict(odd).groups, one_verdict(odd).suspects) == ([[0, 1, 3], [2]], [2])


# What it costs


def _spy_on_messages() -> list[tuple[str, int]]:
    """Record every later message of this process, and every collective of `torch.distributed`, with its bytes."""
    sent: list[tuple[str, int]] = []

    def spied(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append((name, sum(value.nbytes for value in args if isinstance(value, Tensor))))
            return original(*args, **kwargs)

        return call

    def start(channel: Channel, name: str, *args: Any) -> Any:
        sent.append((name, sum(tensor.nbytes for tensor in args[-2])))
        return original_start(channel, name, *args)

    original_start, Channel._start = Channel._start, start
    names = [
        name for name in dir(dist) if name.startswith(("all_", "broadcast", "gather", "scatter", "reduce", "send"))
    ]
    for name in [*names, "barrier", "monitored_barrier", "isend"]:
        if callable(getattr(dist, name)):
            setattr(dist, name, spied(name, getattr(dist, name)))
    return sent


def _messages_per_step(world: World, nums_layers: Sequence[int], every: int) -> list[list[tuple[str, int]]]:
    """Return the messages at the creation of an Agreement and at two steps, for models of some sizes."""
    sent, steps = _spy_on_messages(), []
    for num_layers in nums_layers:
        seed_everything(0)
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(num_layers)))
        agreement = Agreement(model, torch.optim.SGD(model.parameters(), lr=0.1), channel=world.channel, every=every)
        steps.append(list(sent))
        for _ in range(2):
            sent.clear()
            agreement.step(batch=torch.ones(2), loss=torch.zeros(()))
            steps.append(list(sent))
        sent.clear()
    return steps


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_step_costs_one_message_of_40_bytes(num_replicas: int) -> None:
    message = ("allreduce", 40)
    for steps in run_replicas(_messages_per_step, num_replicas, (1, 100), 1):  # 2 and 200 parameters
        # Creating an Agreement looks for a mesh, compares the settings and agrees on the hash function first.
        sizes, mesh, _, settings, _, algorithms = steps[0][:6]
        assert sizes == ("allreduce", 8 * num_replicas)
        assert (mesh[0], settings[0], algorithms[0]) == ("allgather",) * 3
        assert max(mesh[1], algorithms[1]) < 100
        assert settings[1] < 1000
        build = [sizes, mesh, sizes, settings, sizes, algorithms, message]
        assert steps == [build, [message], [message]] * 2


def test_every_0_sends_nothing_in_a_step() -> None:
    for build, *steps in run_replicas(_messages_per_step, 2, (1,), 0):
        assert [kind for kind, _ in build] == ["allreduce", "allgather"] * 2  # the mesh and the settings
        assert steps == [[], []]


# How often, and what then


_STATE = [stage for stage in TENSOR if stage not in ("indices", "batch", "rng")]
_SPREAD = Job(expect="independent", distinct=True, evaluate_after=3)

PAIRS = {
    "two": Job(faults=(Fault((1,), 3, "weights"),)),
    "every 3: lasting": Job(faults=(Fault((1,), 4, "weights"),), steps=8, every=3),
    "every 3: passing": Job(faults=(Fault((1,), 4, "batch"),), steps=8, every=3),
    "every 3: last": Job(faults=(Fault((1,), 8, "weights"),), steps=8, every=3),
    "every 3: last, evaluated": Job(faults=(Fault((1,), 4, "rng"),), every=3, evaluate_after=4),
    "every 0: passing": Job(faults=(Fault((1,), 4, "batch"),), every=0),
    "every 0: lasting": Job(faults=(Fault((1,), 2, "weights"),), every=0),
    "continue, lag 0": Job(faults=(Fault((1,), 2, "rng"), Fault((0,), 4, "batch")), on_divergence="continue", steps=5),
    "continue, lag 1": Job(
        faults=(Fault((1,), 2, "rng"), Fault((0,), 4, "batch")), on_divergence="continue", steps=5, lag=1
    ),
    "independent: state": replace(_SPREAD, faults=tuple(Fault((1,), 3, stage) for stage in _STATE)),
    "independent: indices": replace(_SPREAD, faults=(Fault((1,), 3, "indices"),)),
    "independent: batch": replace(_SPREAD, faults=(Fault((1,), 3, "batch"),)),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Return the results of two replicas for each job."""
    jobs = [replace(job, trace=str(tmp_path_factory.mktemp("trace"))) for job in PAIRS.values()]
    return dict(zip(PAIRS, run_jobs(jobs, 2), strict=True))


def test_two_replicas_have_no_suspects(pairs: dict[str, list[Result]]) -> None:
    verdict = one_verdict(pairs["two"])
    assert (verdict.step, verdict.groups, verdict.suspects) == (3, [[0], [1]], [])
    assert "no-majority" in [item.code for item in verdict.evidence]


def test_every_compares_each_third_step(pairs: dict[str, list[Result]]) -> None:
    verdict = one_verdict(pairs["every 3: lasting"])
    assert (verdict.step, verdict.stage) == (6, "output")
    assert [result.verdict for result in pairs["every 3: passing"]] == [None, None]


def test_finish_compares_final_state_after_any_step(pairs: dict[str, list[Result]]) -> None:
    for name, step, stage in (
        ("every 3: last", 8, "weights"),
        ("every 3: last, evaluated", 4, "rng"),  # equal predictions do not imply equal state
        ("every 0: lasting", 4, "optimizer"),
    ):
        verdict = one_verdict(pairs[name])
        assert (verdict.step, verdict.stage) == (step, stage)
    for result in pairs["every 0: passing"]:
        assert (result.verdict, result.steps_done, result.steps_checked) == (None, 4, 1)


@pytest.mark.parametrize("lag", [0, 1])
def test_continue_keeps_first_verdict_and_continues(lag: int, pairs: dict[str, list[Result]]) -> None:
    results = pairs[f"continue, lag {lag}"]
    verdict = one_verdict(results)
    assert (verdict.step, verdict.stage) == (2, "rng")
    for result in results:
        assert (result.raised, result.steps_done, result.steps_checked) == (False, 5, 5)
        assert [line["agreed"] for line in result.trace[1:]] == [True, True, False, False, False, False]


def test_independent_compares_only_indices_and_batches(pairs: dict[str, list[Result]]) -> None:
    assert [result.verdict for result in pairs["independent: state"]] == [None, None]
    for stage in ("indices", "batch"):
        verdict = one_verdict(pairs[f"independent: {stage}"])
        assert (verdict.step, verdict.stage) == (3, stage)


def test_stop_of_one_replica_stops_all_at_the_same_step() -> None:
    jobs = []
    for replica_id in range(3):
        jobs.append(Job(stop_at=(replica_id, 2)))
        jobs.append(Job(stop_at=(replica_id, 2), lag=1))
        jobs.append(Job(stop_at=(replica_id, 4), every=3, steps=7))  # the wish of step 4 travels with step 6
    results = run_jobs(jobs, 3)
    for number in range(0, 9, 3):
        now, later, seldom = results[number : number + 3]
        assert [result.stops for result in now] == [[False, True, True, True]] * 3
        assert [result.stops for result in later] == [[False, False, True, True]] * 3
        assert [result.stops for result in seldom] == [[False] * 5 + [True] * 2] * 3
