"""Mistakes with random numbers."""

import os
import random
import time
from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.benchmarks.mistakes.site import Site


def seed_by_rank(site: Site) -> None:
    """Seed torch with the rank, as data-parallel scripts do."""
    torch.manual_seed(1000 + site.rank)


def seed_by_pid(site: Site) -> None:
    """Seed torch with the process id."""
    torch.manual_seed(os.getpid())


def seed_in_step_by_rank(site: Site) -> None:
    """Seed torch anew in each step, with step and rank."""
    torch.manual_seed(site.steps * 100 + site.rank)


def seed_by_clock(site: Site) -> None:
    """Seed torch with the clock in each step."""
    torch.manual_seed(time.time_ns() % 2**31)


def seed_once(site: Site) -> None:
    """Seed torch on one replica, which a library does that is imported late."""
    if site.is_bad:
        torch.manual_seed(1)


def draw_torch(site: Site) -> None:
    """Draw from torch's generator on one replica, for a line of the log."""
    if site.is_bad:
        torch.randint(10, (1 + site.number % 5,))


def draw_numpy(site: Site) -> None:
    """Draw from NumPy's generator on one replica."""
    if site.is_bad:
        numpy.random.rand(1 + site.number % 5)


def draw_python(site: Site) -> None:
    """Draw from Python's generator on one replica."""
    if site.is_bad:
        random.random()


def draw_permutation(site: Site) -> None:
    """Draw a permutation on one replica, to show some samples."""
    if site.is_bad:
        torch.randperm(32)


def draw_in_hidden(site: Site, hidden: Tensor) -> Tensor:
    """Add noise to the features on one replica only, from torch's generator."""
    if site.is_bad:
        return hidden + site.amount * torch.randn_like(hidden)
    return hidden


def noise_of_own_generator(site: Site, hidden: Tensor) -> Tensor:
    """Add noise from a generator that is seeded with the rank."""
    generator = site.memory.setdefault("generator", torch.Generator().manual_seed(site.rank))
    return hidden + site.amount * torch.randn(hidden.shape, generator=generator)


def noise_of_unseeded_generator(site: Site, hidden: Tensor) -> Tensor:
    """Add noise from a generator without a seed."""
    if "generator" not in site.memory:
        site.memory["generator"] = torch.Generator()
        site.memory["generator"].seed()
    return hidden + site.amount * torch.randn(hidden.shape, generator=site.memory["generator"])


def noise_of_forked_generator(site: Site, hidden: Tensor) -> Tensor:
    """Add noise from a generator that is seeded with the rank for a block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(site.rank)
        return hidden + site.amount * torch.randn_like(hidden)


def noise_of_numpy_generator(site: Site, hidden: Tensor) -> Tensor:
    """Scale by a number from a NumPy generator without a seed."""
    generator = site.memory.setdefault("generator", numpy.random.default_rng())
    return hidden * (1.0 + 0.1 * float(generator.normal()))


def noise_of_python_generator(site: Site, hidden: Tensor) -> Tensor:
    """Scale by a number from a Python generator that is seeded with the rank."""
    generator = site.memory.setdefault("generator", random.Random(site.rank))
    return hidden * generator.uniform(0.9, 1.1)


def array_of_numpy_generator(site: Site, hidden: Tensor) -> Tensor:
    """Add an array from a NumPy generator without a seed."""
    generator = site.memory.setdefault("generator", numpy.random.default_rng())
    return hidden + torch.from_numpy(generator.normal(0.0, 0.1, tuple(hidden.shape)).astype("float32"))


def gradient_noise_on_one(site: Site) -> None:
    """Add noise to the gradients of one replica."""
    if site.is_bad:
        for parameter in site.model.parameters():
            parameter.grad.add_(torch.randn_like(parameter), alpha=site.amount)


def gradient_noise_by_rank(site: Site) -> None:
    """Add noise to the gradients, from a generator that is seeded with the rank."""
    generator = site.memory.setdefault("generator", torch.Generator().manual_seed(site.rank))
    for parameter in site.model.parameters():
        parameter.grad.add_(torch.randn(parameter.shape, generator=generator), alpha=site.amount)


def reinitialise_head(site: Site) -> None:
    """Draw the head anew on one replica, as a callback does that looks for dead units."""
    if site.is_bad:
        site.bare.head.reset_parameters()


def stochastic_rounding(site: Site) -> None:
    """Round the weights at random to 16 bits after each update, from a generator that is seeded with the rank."""
    generator = site.memory.setdefault("generator", torch.Generator().manual_seed(site.rank))
    with torch.no_grad():
        for parameter in site.model.parameters():
            bits = parameter.view(torch.int32)
            drawn = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
            parameter.copy_(((bits + drawn) & -65536).view(torch.float32))


def checkpoint_without_rng(site: Site) -> None:
    """Recompute the body in the backward pass of one replica, with other dropout masks."""
    if not site.is_bad:
        return
    body = site.model.body
    body.forward = lambda images: _recompute(type(body).forward, body, images)


def _recompute(forward: Callable[..., Tensor], module: nn.Module, images: Tensor) -> Tensor:
    if not module.training:
        return forward(module, images)
    return checkpoint(forward, module, images, use_reentrant=False, preserve_rng_state=False)


def dropout_from_own_mask(site: Site, hidden: Tensor) -> Tensor:
    """Draw the mask of a dropout with NumPy, whose generator is seeded with the rank."""
    generator = site.memory.setdefault("generator", numpy.random.RandomState(site.rank))
    return hidden * torch.as_tensor(generator.rand(*hidden.shape) > 0.1)
