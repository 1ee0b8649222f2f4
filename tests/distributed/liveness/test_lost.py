"""Lost replicas as data, and their text."""

import json
import pickle
from typing import Any

import pytest

from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness.lost import Losses, Lost, ReplicaLost, exit_code_of, is_reporter
from dreplica.errors import DreplicaError, ExitCode

FELL = Failure("ArithmeticError", "it fell")


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (Lost(1), "no response: the process was killed or its host is down"),
        (Lost(1, silent=12.4), "no heartbeat for 12 s: the process is stopped or its host is unreachable"),
        (Lost(1, "raised", failure=FELL), "raised ArithmeticError: it fell"),
        (Lost(1, "unusable", failure=Failure("UsageError", "optim.lr: bad")), "optim.lr: bad"),
        (Lost(1, "hung", 6), "hangs after step 6: its process responds, but the other replicas wait for it"),
        (
            Lost(1, "hung", stack=("train.py:3 in <module>", "data.py:9 in f")),
            "hangs before the first step at data.py:9 in f: its process responds, but the other replicas wait for it",
        ),
        (Lost(1, "ended", 4), "ended after step 4, while the other replicas wait for it"),
        (Lost(1, "finished", 4), "finished after step 4, while the other replicas wait for it"),
        (Lost(1, "absent"), "did not create its Agreement, while the other replicas wait for it"),
        (Lost(0, "store-no-response"), "no response from the rendezvous store, which this replica serves"),
        (
            Lost(0, "store-no-response", silent=7),
            "no response for 7 s from the rendezvous store, which this replica serves",
        ),
        (Lost(0, "store-lost", detail="reset"), "the rendezvous store, which this replica served, is gone (reset)"),
    ],
)
def test_reason_is_rendered_from_data(lost: Lost, reason: str) -> None:
    assert lost.reason == reason
    assert lost.as_dict()["reason"] == reason
    assert lost.as_dict()["code"] == lost.code
    assert Lost.from_dict(json.loads(json.dumps(lost.as_dict()))) == lost


def test_losses_are_described_in_few_lines() -> None:
    hung = [Lost(i, "hung", 6, stack=("train.py:3 in <module>", ".../torch/data.py:9 in load")) for i in (2, 4)]
    losses = Losses((Lost(1, "raised", 5, FELL), *hung), {0: 7})
    assert losses.describe().splitlines() == [
        "replica 0 finished after 7 steps and waits in finish()",
        "replica 1: raised ArithmeticError: it fell (after step 5)",
        f"replicas 2, 4: {hung[0].reason}",
        "stack of replicas 2, 4, innermost last:",
        "  train.py:3 in <module>",
        "  .../torch/data.py:9 in load",
    ]
    assert hung[0].reason.startswith("hangs after step 6 at train.py:3 in <module>: ")
    assert Losses.from_dict(json.loads(json.dumps(losses.as_dict()))) == losses


def test_description_of_many_losses_is_short() -> None:
    assert Losses(tuple(Lost(i) for i in range(1000))).describe().startswith("replicas 0-999: no response: ")
    steps = Losses(tuple(Lost(i, "hung", i, stack=("a.py:1 in f",)) for i in range(1000)))
    assert len(steps.describe()) < 2000


def test_replica_lost_has_a_code_and_fields() -> None:
    error = ReplicaLost("gone", code="timeout", lost=[Lost(2), Lost(3, "raised", failure=FELL)], seconds=1.0)
    assert isinstance(error, DreplicaError)
    assert isinstance(error, RuntimeError)
    assert (error.code, error.fields["seconds"], error.fields["ranks"]) == ("timeout", 1.0, [2, 3])
    assert error.fields["reasons"] == {2: "no-response", 3: "raised"}
    copy: Any = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.fields, copy.lost) == ("gone", error.code, error.fields, error.lost)


@pytest.mark.parametrize(("gone", "reporter"), [([], 0), ([0], 1), ([0, 1], 2), ([0, 1, 2], 0)])
def test_first_survivor_is_the_reporter(gone: list[int], reporter: int) -> None:
    lost = [Lost(replica_id) for replica_id in gone]
    assert [is_reporter(lost, replica_id, 3) for replica_id in range(3)] == [i == reporter for i in range(3)]


def test_exit_code_is_unusable_if_all_losses_are() -> None:
    unusable = Lost(1, "unusable", failure=FELL)
    assert exit_code_of([unusable]) == ExitCode.UNUSABLE
    assert exit_code_of([unusable, Lost(2)]) == exit_code_of([]) == ExitCode.FAILED
