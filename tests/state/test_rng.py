"""Seeds, and independent streams of random numbers."""

import random
import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.utils.data import DataLoader

from dreplica.config.schema import SeedConfig, check_model_seeds
from dreplica.data.loading.index_stream import IndexSampler, draw_order, epoch_generator
from dreplica.data.loading.loader import load_batches
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from dreplica.state.rng import (
    fresh_seed,
    get_rng_state,
    model_seed,
    seed_generators,
    set_rng_state,
    shares_model_seed,
)
from tests.fixtures import tiny_images
from tests.harness import run_replicas

CPU = torch.device("cpu")


def state_bytes() -> tuple[Any, ...]:
    numpy_state = numpy.random.get_state()
    return (
        random.getstate(),
        numpy_state[1].tobytes(),
        numpy_state[2:],
        torch.get_rng_state().numpy().tobytes(),
    )


def draw() -> tuple[Any, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        numpy.random.standard_normal(3).tobytes(),
        torch.randn(5).numpy().tobytes(),
    )


def config(model: Any) -> SeedConfig:
    return SeedConfig.model_validate({"model": model})


@pytest.mark.parametrize(
    ("model", "seeds", "shared"),
    [
        (7, [7, 7, 7], True),
        ([4, 5, 6], [4, 5, 6], False),
        ([4, 4, 4], [4, 4, 4], True),
        ([4, 4, 5], [4, 4, 5], False),
        ("distinct", [42, 43, 44], False),
        (None, [None, None, None], True),
        (0, [0, 0, 0], True),
        (2**32 - 1, [2**32 - 1] * 3, True),
    ],
)
def test_model_seed_of_each_replica(model: Any, seeds: list[int | None], shared: bool) -> None:
    section = config(model)
    check_model_seeds(section, 3)
    assert [model_seed(section, replica_id) for replica_id in range(3)] == seeds
    assert shares_model_seed(section, 3) is shared


def test_one_replica_shares_the_model_seed() -> None:
    assert shares_model_seed(config("distinct"), 1)


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_list_needs_a_seed_for_each_replica(seeds: list[int]) -> None:
    with pytest.raises(UsageError, match=rf"^seed\.model: expected 2 seeds for 2 replicas, got {len(seeds)}: "):
        check_model_seeds(config(seeds), 2)


@pytest.mark.parametrize("seed", [-1, 2**32, "random", 1.0, True, [1, -1], [1, 2**32]])
def test_invalid_seed_is_rejected(seed: Any) -> None:
    with pytest.raises(ValidationError):
        config(seed)


def test_torch_keeps_only_32_bits_of_a_seed() -> None:
    # The reason for the limit of 2**32 - 1: replicas with different larger seeds would be built alike.
    one, other = (torch.randn(9, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3 + 2**32))
    assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_seeding_fixes_every_global_generator(seed: int) -> None:
    assert seed_generators(seed) == seed
    first = draw()
    seed_generators(seed)
    assert draw() == first
    seed_generators(seed ^ 1)
    assert not set(draw()) & set(first)


def test_state_is_restored_byte_for_byte() -> None:
    seed_generators(5)
    random.gauss(0, 1), numpy.random.standard_normal()  # each keeps half a pair for the next call
    before, state = state_bytes(), get_rng_state()
    first = draw()
    assert state_bytes() != before
    set_rng_state(state)
    assert state_bytes() == before
    assert draw() == first


def test_fresh_seed_draws_from_no_generator() -> None:
    seed_generators(5)
    before = state_bytes()
    seeds = {fresh_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert state_bytes() == before
    for seed in seeds:
        TypeAdapter(SeedConfig).validate_python({"model": seed, "data": seed})  # a recorded seed can be given


def draw_unseeded(_world: World) -> tuple[int, bytes]:
    seed = seed_generators(None)
    return seed, torch.randn(8).numpy().tobytes()


def test_unseeded_processes_draw_different_numbers() -> None:
    results = run_replicas(draw_unseeded, 3)
    assert len({seed for seed, _ in results}) == 3
    assert len({drawn for _, drawn in results}) == 3
    for seed, drawn in results:
        seed_generators(seed)
        assert torch.randn(8).numpy().tobytes() == drawn


def test_unseeded_process_draws() -> None:
    # torch's default generator is seeded at random in each process; one's own is not, so it agrees by accident.
    code = "import torch; print(torch.initial_seed()); print(torch.Generator().initial_seed())"
    one, other = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.splitlines()
        for _ in range(2)
    )
    assert one[0] != other[0]
    assert one[1] == other[1] == "67280421310721"


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_data_loading_leaves_global_generators_unchanged(num_workers: int) -> None:
    train, _, _ = tiny_images(None)  # type: ignore[arg-type]
    seed_generators(5)
    before = state_bytes()
    for seed in (0, 1):
        draw_order(100, seed, 1)
        epoch_generator(seed, 1)
        stream = IndexSampler(Channel(), seed).training_batches(len(train), 16, epoch=1)
        assert len(list(load_batches(train, stream, CPU, num_workers, seed, epoch=1))) == 5
    assert state_bytes() == before


def test_plain_loader_draws_from_the_global_generator() -> None:
    # The trap that load_batches avoids: an unshuffled pass moves every later draw.
    train, _, _ = tiny_images(None)  # type: ignore[arg-type]
    before = state_bytes()
    for _ in DataLoader(train):
        pass
    assert state_bytes() != before
