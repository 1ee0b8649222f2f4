"""Seeds and the global random number generators.

The model, the order of the data and augmentation draw from separate streams.
"""

import random
from typing import Any

import numpy
import torch

from dreplica.config.schema import _MAX_SEED, SeedConfig

DISTINCT_BASE = 42


def shares_model_seed(config: SeedConfig, num_replicas: int) -> bool:
    """Return True if all replicas should be built with the same seed.

    True for unseeded replicas, too: their difference is then reported.
    """
    if isinstance(config.model, list):
        return len(set(config.model)) == 1
    return config.model != "distinct" or num_replicas == 1


def model_seed(config: SeedConfig, replica_id: int) -> int | None:
    """Return the seed of a replica's build, or None if it is unseeded."""
    if config.model == "distinct":
        return DISTINCT_BASE + replica_id
    return config.model[replica_id] if isinstance(config.model, list) else config.model


def seed_generators(seed: int | None) -> int:
    """Seed the generators of Python, NumPy and torch, on the CPU and on every GPU.

    A seed of None is replaced by one from the operating system. It is thereby recorded, and it differs between
    replicas even if their processes were forked from one. (A new torch.Generator() that is never seeded is not random:
    it starts from a constant, so replicas agree by accident.)

    Returns:
        The seed used.
    """
    if seed is None:
        seed = fresh_seed()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def get_rng_state() -> dict[str, Any]:
    """Return the state of all global generators of this process, for `set_rng_state`."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the state that `get_rng_state` returned."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def fresh_seed() -> int:
    """Return a seed from the operating system's entropy, without drawing from a generator."""
    return random.SystemRandom().randrange(_MAX_SEED + 1)
