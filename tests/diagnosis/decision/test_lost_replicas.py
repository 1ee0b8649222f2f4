"""The verdict on replicas that were lost."""

from dreplica.diagnosis.decision.lost_replicas import replica_lost
from dreplica.distributed.lost import Lost, ReplicaLost
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
