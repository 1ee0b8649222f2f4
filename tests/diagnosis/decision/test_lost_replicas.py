"""The verdict on replicas that were lost."""

from dreplica.diagnosis.decision.lost_replicas import replica_lost
from dreplica.distributed.liveness.lost import Lost, ReplicaLost
from tests.messages import data_of


def test_replica_lost_names_replica_and_step() -> None:
    verdict = replica_lost([Lost(2)], 4, ReplicaLost("connection closed"))
    assert (verdict.cause, verdict.step, verdict.suspects) == ("replica-lost", 5, [2])
    assert "replica 2 was lost in step 5: no response" in verdict.summary
    assert data_of(verdict.evidence, "loss-noticed") == {"error": "connection closed"}
    unknown = replica_lost([], None, KeyError("x"))
    assert data_of(unknown.evidence, "raised-error") == {"error": "KeyError: 'x'"}
    assert (unknown.step, unknown.suspects) == (None, [])
    assert "before the first step" in unknown.summary


def test_replica_that_hangs_is_shown_with_its_stack() -> None:
    stack = ("train.py:3 in <module>", "data.py:9 in load")
    verdict = replica_lost(
        [Lost(2, "hung", 4, stack=stack)], 4, ReplicaLost("long text", noticed="no response for 9 s")
    )
    evidence = data_of(verdict.evidence, "replica-lost")
    assert (evidence["loss"], evidence["stack"], evidence["silent"]) == ("hung", list(stack), None)
    assert "at data.py:9 in load" in verdict.summary
    assert data_of(verdict.evidence, "loss-noticed") == {"error": "no response for 9 s"}
