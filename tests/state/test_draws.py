"""The distance of two states of a generator, in draws."""

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from dreplica.state.draws import MOST_DRAWS, draws_apart, draws_between, same_generator_state
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.stages import rng_entries


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


def of_python() -> tuple[Callable[[], Any], Callable[[int], Any]]:
    own = random.Random(5)
    return own.getstate, lambda count: [own.getrandbits(32) for _ in range(count)]


def of_numpy() -> tuple[Callable[[], Any], Callable[[int], Any]]:
    own = numpy.random.RandomState(5)
    return own.get_state, lambda count: own.bytes(4 * count)


def of_torch() -> tuple[Callable[[], Any], Callable[[int], Any]]:
    own = torch.Generator().manual_seed(5)
    return own.get_state, lambda count: torch.empty(count, dtype=torch.int32).random_(generator=own)


def of_pcg() -> tuple[Callable[[], Any], Callable[[int], Any]]:
    own = numpy.random.default_rng(5)
    return lambda: own.bit_generator.state, lambda count: own.integers(0, 2**64 - 1, count // 2, numpy.uint64, True)


def of_philox() -> tuple[Callable[[], Any], Callable[[int], Any]]:
    own = numpy.random.Generator(numpy.random.Philox(5))
    return lambda: own.bit_generator.state, lambda count: own.integers(0, 2**64 - 1, count // 2, numpy.uint64, True)


KINDS = [of_python, of_numpy, of_torch, of_pcg, of_philox]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 2, 624, 1000])
@pytest.mark.parametrize("count", [2, 622, 624, 626, 5000, MOST_DRAWS])
def test_draws_are_counted_in_both_directions(kind: Any, before: int, count: int) -> None:
    state, draw = kind()
    draw(before)
    one = state()
    draw(count)
    assert draws_between(one, state()) == count
    assert draws_between(state(), one) == -count


@pytest.mark.parametrize("kind", KINDS)
def test_unrelated_or_distant_states_have_no_count(kind: Any) -> None:
    state, draw = kind()
    one = state()
    draw(MOST_DRAWS + 2)
    assert draws_between(one, state()) is None
    assert draws_between(one, state(), most=MOST_DRAWS + 2) == MOST_DRAWS + 2


def test_states_of_other_seeds_have_no_count() -> None:
    assert draws_between(random.Random(1).getstate(), random.Random(2).getstate()) is None
    one, other = (torch.Generator().manual_seed(seed).get_state() for seed in (1, 2))
    assert draws_between(one, other) is None
    assert draws_between(one, random.Random(1).getstate()) is None
    assert draws_between("lost", None) is None


@pytest.mark.parametrize("bit", range(0, 32, 5))
@pytest.mark.parametrize("word", [0, 300, 623])
def test_flipped_bit_is_not_a_draw(word: int, bit: int) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(7, generator=generator)
    state = generator.get_state()
    flipped = state.clone()
    flipped[24 + 8 * word + bit // 8] ^= 1 << (bit % 8)
    assert draws_between(state, flipped) is None
    assert not same_generator_state(state, flipped)
    before = random.Random(5).getstate()
    words = list(before[1])
    words[word] ^= 1 << bit
    assert draws_between(before, (before[0], tuple(words), before[2])) is None


def test_cached_normal_number_is_no_draw_of_words() -> None:
    own = random.Random(5)
    own.gauss(0, 1)
    one = own.getstate()
    own.gauss(0, 1)
    assert draws_between(one, own.getstate()) == 0
    assert draws_between(one, (*one[:2], 1.5)) is None
    numpys = numpy.random.RandomState(5)
    numpys.randn()
    cached = numpys.get_state()
    numpys.randn()
    assert draws_between(cached, numpys.get_state()) == 0


def test_offset_of_a_gpu_counts() -> None:
    def state(seed: int, offset: int) -> torch.Tensor:
        return torch.tensor([seed, offset], dtype=torch.int64).view(torch.uint8)

    assert draws_between(state(7, 100), state(7, 108)) == 8
    assert draws_between(state(7, 108), state(7, 100)) == -8
    assert draws_between(state(7, 100), state(8, 100)) is None
    assert draws_between(state(7, 0), state(7, 2**40)) is None


def test_packed_states_count_as_the_generators_own() -> None:
    before = dict(rng_entries())
    random.random()
    numpy.random.bytes(12)
    torch.randint(10, (3,))
    after = dict(rng_entries())
    assert draws_apart(before, after) == {"numpy": 3, "python": 2, "torch.cpu": 3}
    random.gauss(0, 1)
    numpy.random.randn()
    cached = dict(rng_entries())
    random.gauss(0, 1)
    numpy.random.randn()
    assert draws_apart(cached, dict(rng_entries())) == {"numpy": 0, "python": 0}


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("byte", [8, 9, 16, 17])
def test_flipped_position_is_not_a_draw(byte: int, bit: int) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(300, generator=generator)
    state = generator.get_state()
    flipped = state.clone()
    flipped[byte] ^= 1 << bit
    assert draws_between(state, flipped) is None


def test_draws_apart_names_each_generator() -> None:
    one = get_rng_state()
    assert draws_apart(one, get_rng_state()) == {}
    random.random()
    torch.randint(10, (1,))
    assert draws_apart(one, get_rng_state()) == {"python": 2, "torch": 1}
    torch.manual_seed(random.getrandbits(40))
    assert draws_apart(one, get_rng_state()) == {"python": 4}
