"""Seeds and the global generators. Model, data order and augmentation draw from streams of their own."""

import random
from typing import Any

import numpy
import torch

from dreplica.config.schema import _MAX_SEED, SeedConfig

DISTINCT_BASE = 42


def shares_model_seed(config: SeedConfig, num_replicas: int) -> bool:
    """Whether all replicas are meant to be built alike. Unseeded ones are: that they differ is then the finding."""
    if isinstance(config.model, list):
        return len(set(config.model)) == 1
    return config.model != "distinct" or num_replicas == 1


def model_seed(config: SeedConfig, replica_id: int) -> int | None:
    """The seed of one replica's build; None if unseeded."""
    if config.model == "distinct":
        return DISTINCT_BASE + replica_id
    return config.model[replica_id] if isinstance(config.model, list) else config.model


def seed_generators(seed: int | None) -> int:
    """Seeds Python, NumPy, torch on the CPU and on every GPU; returns the seed used.

    With None, a fresh seed comes from the operating system, so that it is on record and differs between replicas even
    where their processes are forks of one. (A torch.Generator() of one's own that is never seeded does not draw at
    random: it starts from a constant, so replicas agree by accident.)
    """
    if seed is None:
        seed = fresh_seed()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def get_rng_state() -> dict[str, Any]:
    """The state of all global generators of this process; `set_rng_state` restores it."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `get_rng_state` returned."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def fresh_seed() -> int:
    """A seed from the operating system's entropy; no generator is touched."""
    return random.SystemRandom().randrange(_MAX_SEED + 1)
