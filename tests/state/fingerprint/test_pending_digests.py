"""Asynchronous digests are awaited at the next step, and results stay the same."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dreplica.agreement import hasher as hashing
from dreplica.agreement.agreement import Agreement
from dreplica.agreement.hasher import Hasher
from dreplica.distributed.process_group import World
from dreplica.run.session import Session
from dreplica.state.fingerprint.fingerprint import ALGORITHM
from tests.agreement.bodies import Fault, Job, Result, train_all
from tests.harness import run_replicas
from tests.state.fingerprint.late import LateHasher

pytestmark = pytest.mark.xdist_group("late")  # whose results are made once

EVERYONE = (0, 1, 2)

JOBS = {
    **{
        f"{stage}, step {step}, lag {lag}": Job(
            faults=(Fault((1,), step, stage),), lag=lag, evaluate_after=step if stage == "predictions" else None
        )
        for stage, step, lag in (("batch", 2, 1), ("weights", 2, 0), ("weights", 4, 1), ("predictions", 2, 1))
    },
    "nothing": Job(lag=1, evaluate_after=2),
    "every 3": Job(lag=1, every=3, steps=7),
    "stop": Job(lag=1, stop_at=(2, 2)),
    "continue": Job(faults=(Fault((2,), 2, "rng"),), lag=1, on_divergence="continue", evaluate_after=3),
    "independent": Job(faults=(Fault((0,), 3, "batch"),), lag=1, expect="independent", distinct=True),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Result], list[Result]]]:
    """Return the results of three replicas for each job, with immediate and with late digests."""
    jobs = [
        replace(job, trace=str(tmp_path_factory.mktemp("trace")), late=late)
        for job in JOBS.values()
        for late in ((), EVERYONE)
    ]
    rows = [list(results) for results in zip(*run_replicas(train_all, 3, jobs), strict=True)]
    return {name: (rows[2 * number], rows[2 * number + 1]) for number, name in enumerate(JOBS)}


@pytest.mark.parametrize("name", JOBS)
def test_late_digests_give_the_same_results(name: str, results: dict[str, tuple[list[Result], list[Result]]]) -> None:
    at_once, late = results[name]
    assert (at_once[0].verdict is None) == (name in ("nothing", "every 3", "stop"))
    for one, other in zip(at_once, late, strict=True):
        assert replace(one, trace=[]) == replace(other, trace=[])
        lines = [[{**line, "digests": list(line["digests"])} for line in row.trace[1:]] for row in (one, other)]
        assert lines[0] == lines[1] != []
        assert one.trace[0]["algorithm"] == ALGORITHM
        assert other.trace[0]["algorithm"] == LateHasher().algorithm


def test_stop_arrives_one_step_later(results: dict[str, tuple[list[Result], list[Result]]]) -> None:
    assert [result.stops for result in results["stop"][1]] == [[False, False, True, True]] * 3


def test_lag_1_waits_one_step_later() -> None:
    hasher = LateHasher()
    agreement = Agreement(nn.Linear(2, 2), lag=1, hasher=hasher)
    assert hasher.waited == [0]  # the build
    words = []
    for step in range(1, 4):
        agreement.step(batch=torch.ones(2))
        words.append(agreement.last_digest)
        assert hasher.waited == list(range(step))
        assert agreement.agreed_until == step - 1
    agreement.complete()  # as before a checkpoint
    assert (hasher.waited, agreement.agreed_until) == ([0, 1, 2, 3], 3)
    agreement.step()
    assert hasher.waited == [0, 1, 2, 3]
    agreement.evaluation({"logits": torch.ones(1)})
    assert hasher.waited == [0, 1, 2, 3, 4, 5]
    agreement.step()
    agreement.finish()
    assert (hasher.waited, agreement.agreed_until, agreement.steps_checked) == ([*range(7)], 5, 5)
    assert len({word.value for word in words if word}) == 3
    assert hasher.waited == [*range(7)]  # each is awaited once


def test_lag_0_waits_at_the_step() -> None:
    hasher = LateHasher()
    agreement = Agreement(nn.Linear(2, 2), hasher=hasher)
    agreement.step()
    assert (hasher.waited, agreement.agreed_until) == ([0, 1], 1)


# Replicas of which not all can


def test_digests_of_different_algorithms_are_not_compared() -> None:
    jobs = [Job(lag=1, late=(1,), on_divergence=how) for how in ("stop", "continue")]
    rows = run_replicas(train_all, 3, jobs)
    for result, job in ((row[number], job) for number, job in enumerate(jobs) for row in rows):
        verdict = result.verdict
        assert verdict is not None
        assert (verdict.cause, verdict.step, verdict.stage) == ("environment-differs", 0, None)
        assert (verdict.groups, verdict.suspects) == ([[0, 2], [1]], [1])
        assert [(row.code, row.data["replicas"], row.data["algorithm"]) for row in verdict.evidence] == [
            ("fingerprint-algorithm", [0, 2], ALGORITHM),
            ("fingerprint-algorithm", [1], LateHasher().algorithm),
        ]
        assert [remedy.code for remedy in verdict.remedy] == ["install-same-versions"]
        assert result.steps_done == (-1 if job.on_divergence == "stop" else 4)


def _choose(world: World, able: Sequence[int]) -> tuple[bool, list[str]]:
    def hasher_for(devices: Any) -> Hasher:
        return LateHasher() if world.replica_id in able else Hasher()

    hashing.hasher_for = hasher_for  # type: ignore[assignment]
    session: Any = SimpleNamespace(channel=world.channel, device=None, warnings=[])
    Session.choose_hasher(session)
    return session.hasher.is_asynchronous, session.warnings


@pytest.mark.parametrize(("able", "chosen"), [((), False), ((0, 1), True), ((1,), False)])
def test_run_hashes_on_gpu_only_if_all_replicas_can(able: Sequence[int], chosen: bool) -> None:
    (one, warnings), (other, _) = run_replicas(_choose, 2, able)
    assert one == other == chosen
    assert bool(warnings) == (len(able) == 1)
    for line in warnings:
        assert f"replica 0: {ALGORITHM}, replica 1: {LateHasher().algorithm}" in line
