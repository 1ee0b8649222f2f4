"""Repeated builds: unseeded draws, and the operator at which builds diverge."""

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

BEFORE = Evidence("text", "before")
FOUND = Verdict(False, "unexplained", "diverged", step=0, stage="weights", groups=[[0, 2], [1]], evidence=[BEFORE])


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


class Gathered(Channel):
    """Channel whose `gather` returns prepared rows."""

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
    """Weights and buffers are the same in each build, generator states differ."""
    for _ in range(random.SystemRandom().randrange(2, 1000)):
        random.random()
    return sound()


def through_numpys_memory() -> Replica:
    """No operator records the write."""
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
def test_rebuild_reproducible_if_seeded(build: Callable[[], Replica], reproducible: bool) -> None:
    assert rebuild(build, 42).reproducible is reproducible


def test_rebuild_restores_generators() -> None:
    before = rng_stage()
    rebuild(one_more_draw, 42)
    assert rng_stage() == before

    def fails() -> Replica:
        torch.rand(1)
        raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        rebuild(fails, 42)
    assert rng_stage() == before


def test_rebuild_depends_on_seed() -> None:
    one, same, other = rebuild(sound, 1), rebuild(sound, 1), rebuild(sound, 2)
    assert [record.outputs for record in one.records] == [record.outputs for record in same.records]
    assert [record.outputs for record in one.records] != [record.outputs for record in other.records]


def explained(*builds: Callable[[], Replica], found: Verdict = FOUND) -> Verdict:
    rows: list[Rebuilt] = [rebuild(build, 42) for build in builds]
    return explain_build(found, rows[0], Gathered(rows))


def test_explain_build_names_diverging_draw() -> None:
    verdict = explained(sound, one_more_draw, sound)
    assert verdict.cause == "unexplained", "the draw is named, and the cause is decided elsewhere"
    assert verdict.phase == "build"
    assert verdict.operator == "aten.rand.default"
    before, reproduces, diverges = verdict.evidence
    assert (before, reproduces.code, diverges.code) == (BEFORE, "rebuild-reproduces", "rebuild-diverges")
    assert diverges.data["one"].endswith(" on replica 0")
    assert re.search(r"^aten\.rand\.default at \S+test_rebuild\.py:\d+ on replica 1$", diverges.data["other"])


def test_explain_build_not_seeded() -> None:
    for number, builds in enumerate([(numpys_own, sound, sound), (sound, numpys_own, sound)]):
        verdict = explained(*builds)
        assert verdict.cause == "build-not-seeded"
        _, varies, diverges = verdict.evidence
        assert (varies.code, varies.data) == ("rebuild-varies", {"replicas": [number]})
        assert re.search(r"operator \d+: \S+ at \S+ in one build, \S+ at \S+ in the next", diverges.text)
        assert "seed-own-generator" in [remedy.code for remedy in verdict.remedy]
        assert verdict.phase == "build"


def test_explain_build_difference_outside_operators() -> None:
    verdict = explained(sound, through_numpys_memory, sound)
    assert verdict.cause == "build-not-seeded"
    assert verdict.evidence[-1].code == "rebuild-operators-agree"
    assert verdict.operator is None

    verdict = explained(sound, sound, sound)
    assert verdict.cause == "unexplained"
    assert verdict.evidence[-1].code == "rebuild-operators-agree"


def test_explain_build_of_different_length() -> None:
    def longer() -> Replica:
        replica = sound()
        replica.model.register_buffer("more", torch.ones(1).neg())
        return replica

    verdict = explained(sound, longer, sound)
    assert verdict.evidence[-1].data["one"] == "no further operator on replica 0"
