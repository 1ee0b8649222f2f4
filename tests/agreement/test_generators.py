"""Generators that a script does not use, on one process and on two."""

import random
from typing import Any

import numpy
import pytest
import torch

import dreplica
from dreplica.agreement.generators import GeneratorUse, describe_unseeded, differing, seed_commands
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
