"""Generators that a script does not use, on one process and on two."""

import random
from typing import Any

import numpy
import pytest
import torch

import dreplica
from dreplica.agreement.generators import GeneratorUse, compare_states, describe_unseeded, differing, seed_commands
from tests.agreement.own_loop import train_on_rank
from tests.harness import run_replicas

DRAWS = {"python": random.random, "numpy": lambda: numpy.random.rand(1), "torch.cpu": lambda: torch.rand(1)}


@pytest.mark.parametrize("name", DRAWS)
def test_generator_is_compared_once_it_was_drawn_from(name: str) -> None:
    use = GeneratorUse()
    before = dict(use.entries())
    assert before["python"] == before["numpy"] == b"not drawn from"
    DRAWS[name]()
    after = dict(use.entries())
    changed = [key for key in before if not _same(before[key], after[key])]
    assert changed == [name]
    assert use.not_drawn == {"python", "numpy"} - {name}


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_generator_stays_in_use_after_it_returns_to_its_state() -> None:
    use, state = GeneratorUse(), random.getstate()
    random.random()
    use.entries()
    random.setstate(state)
    assert "python" not in use.not_drawn
    assert dict(use.entries())["python"] != b"not drawn from"


def test_resume_takes_over_what_was_drawn() -> None:
    use = GeneratorUse()
    use.resume(["numpy"])
    assert use.not_drawn == {"numpy"}


def test_messages_name_only_the_generators_that_differ() -> None:
    rows = [{"python": "a", "numpy": "b"}, {"python": "a", "numpy": "c"}]
    assert differing(rows) == ["numpy"]
    assert differing([]) == []
    assert "Python" not in describe_unseeded(["numpy"])
    assert seed_commands(["numpy", "python"]) == "random.seed(0); numpy.random.seed(0)"


def test_unseeded_generators_stop_no_run_that_does_not_use_them() -> None:
    used, unused = (run_replicas(_unseeded, 2, draws) for draws in (True, False))
    assert [verdict.agreed for verdict in unused] == [True, True]
    assert "replicas diverged at step 3: batch, inputs" in used[0]
    assert "  evidence: these generators differed before the first step already: python\n" in used[0]
    assert "  remedy: random.seed(0)  # on every replica, before the build\n" in used[0]
    assert "\n" not in used[1]


def _unseeded(world: Any, draws: bool) -> dreplica.Verdict | str:
    if draws:
        return train_on_rank(world, "unseeded", {})
    random.seed(world.replica_id)
    return train_on_rank(world, "other", {})


def test_compare_states_tells_code_from_flipped_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    torch.rand(3, generator=generator)
    drawn, seeded, flipped = generator.get_state(), torch.Generator().manual_seed(2).get_state(), state.clone()
    flipped[1000] ^= 1

    def lines(*states: torch.Tensor) -> list[str]:
        return [each.code for each in compare_states(["torch.cpu"], [{"torch.cpu": each} for each in states])]

    assert lines(state, state, drawn) == ["generators-drawn-apart"]
    assert lines(state, seeded) == ["generators-seeded-apart"]
    assert lines(state, flipped) == lines(state, state) == []
    assert compare_states(["torch.cpu"], [{"torch.cpu": state}, {}]) == [], "the state has changed since"


BUILDS = {
    "seed": "generators-differ",
    "draw": "generators-differ",
    "flip": "unexplained",  # which a fault of memory leaves as well
    "dtype": "structure-differs",
    "weight": "unexplained",
}


@pytest.mark.process
def test_build_names_generators_and_dtypes_that_differ() -> None:
    for verdict in run_replicas(_builds, 2):
        assert verdict == BUILDS


def _builds(world: Any) -> dict[str, str]:
    found = {}
    for kind in BUILDS:
        torch.manual_seed(1)
        model = torch.nn.Linear(2, 2)
        if world.replica_id == 1:
            _change(kind, model)
        try:
            dreplica.Agreement(model, channel=world.channel, quiet=True)
        except dreplica.Divergence as divergence:
            found[kind] = divergence.verdict.cause
    return found


def _change(kind: str, model: torch.nn.Module) -> None:
    state = torch.get_rng_state()
    state[1000] ^= 1
    changes: dict[str, Any] = {
        "seed": lambda: torch.manual_seed(2),
        "draw": lambda: torch.nn.Linear(2, 2),
        "flip": lambda: torch.set_rng_state(state),
        "dtype": lambda: model.to(torch.bfloat16),
        "weight": lambda: torch.nn.init.ones_(model.weight),
    }
    changes[kind]()
