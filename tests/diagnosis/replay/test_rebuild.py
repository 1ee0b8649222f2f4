"""A build run again tells what it draws that nobody seeded, and where two builds part."""

import random
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.replay.rebuild import Rebuilt, explain_build, rebuild
from dreplica.distributed.channel import Channel
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.stages import rng_stage
from tests.fixtures import tiny_model
from tests.messages import codes, data_of, text_of

BEFORE = Evidence.of("no-majority", num_replicas=3)
FOUND = Verdict(
    False,
    "unexplained",
    "parted",
    step=0,
    stage="weights",
    groups=[[0, 2], [1]],
    evidence=[BEFORE],
)


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


class Gathered(Channel):
    """All replicas' answers, given beforehand."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__()
        self.rows = rows

    def gather(self, value: Any) -> list[Any]:
        return self.rows


def replica_of(model: nn.Module) -> Replica:
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))


def sound() -> Replica:
    return replica_of(tiny_model(5))


def one_more_draw() -> Replica:
    torch.rand(1)
    return sound()


def numpys_own() -> Replica:
    replica = sound()
    with torch.no_grad():
        replica.model[5].bias.copy_(torch.from_numpy(numpy.random.default_rng().normal(size=5)))
    return replica


def entropy_in_a_buffer() -> Replica:
    replica = sound()
    replica.model[1].running_mean += random.SystemRandom().random()
    return replica


def drawn_in_vain() -> Replica:
    """Weights and buffers come out the same, the generators do not."""
    for _ in range(random.SystemRandom().randrange(2, 1000)):
        random.random()
    return sound()


def through_numpys_memory() -> Replica:
    """No operator shows it."""
    replica = sound()
    replica.model[5].bias.detach().numpy()[:] = numpy.random.default_rng().normal(size=5)
    return replica


@pytest.mark.parametrize(
    ("build", "reproducible"),
    [
        (sound, True),
        (one_more_draw, True),
        (numpys_own, False),
        (entropy_in_a_buffer, False),
        (drawn_in_vain, False),
        (through_numpys_memory, False),
    ],
)
def test_a_build_that_depends_on_its_seed_alone_is_reproducible(
    build: Callable[[], Replica], reproducible: bool
) -> None:
    assert rebuild(build, 42).reproducible is reproducible


def test_the_generators_are_put_back_also_after_a_failure() -> None:
    before = rng_stage()
    rebuild(one_more_draw, 42)
    assert rng_stage() == before

    def fails() -> Replica:
        torch.rand(1)
        raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        rebuild(fails, 42)
    assert rng_stage() == before


def test_the_seed_counts() -> None:
    one, same, other = rebuild(sound, 1), rebuild(sound, 1), rebuild(sound, 2)
    assert [record.outputs for record in one.records] == [record.outputs for record in same.records]
    assert [record.outputs for record in one.records] != [record.outputs for record in other.records]


def explained(*builds: Callable[[], Replica], found: Verdict = FOUND) -> Verdict:
    rows: list[Rebuilt] = [rebuild(build, 42) for build in builds]
    return explain_build(found, rows[0], Gathered(rows))


def test_explain_build_names_the_differing_draw() -> None:
    verdict = explained(sound, one_more_draw, sound)
    assert verdict.cause == "unexplained", "what draws more is said, what it means is not decided here"
    assert verdict.phase == "build"
    assert verdict.operator == "aten.rand.default"
    assert verdict.evidence[0].code == "no-majority"
    assert "rebuild-reproduces" in codes(verdict.evidence)
    line = text_of(verdict.evidence, "rebuild-diverges")
    assert "on replica 0" in line
    assert "aten.rand.default at" in line
    assert "test_rebuild.py" in line
    assert "on replica 1" in line


def test_a_build_that_does_not_reproduce_itself_is_not_seeded() -> None:
    for number, builds in enumerate([(numpys_own, sound, sound), (sound, numpys_own, sound)]):
        verdict = explained(*builds)
        assert verdict.cause == "build-not-seeded"
        assert data_of(verdict.evidence, "rebuild-varies") == {"replicas": [number]}
        line = text_of(verdict.evidence, "rebuild-diverges")
        assert re.search(r"operator \d+: \S+ at \S+ in one build, \S+ at \S+ in the next", line)
        assert "seed-own-generator" in codes(verdict.remedy)
        assert verdict.phase == "build"


def test_a_difference_that_no_operator_shows_is_said_to_be_outside_of_them() -> None:
    verdict = explained(sound, through_numpys_memory, sound)
    assert verdict.cause == "build-not-seeded"
    assert verdict.evidence[-1].code == "rebuild-operators-agree"
    assert verdict.operator is None

    verdict = explained(sound, sound, sound)
    assert verdict.cause == "unexplained"
    assert verdict.evidence[-1].code == "rebuild-operators-agree"


def test_a_build_that_goes_on_longer_parts_at_the_others_end() -> None:
    def longer() -> Replica:
        replica = sound()
        replica.model.register_buffer("more", torch.ones(1).neg())
        return replica

    verdict = explained(sound, longer, sound)
    assert "no further operator" in verdict.evidence[-1].text
