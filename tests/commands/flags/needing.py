"""Models that need one flag or another, or none, on the CPU; for `model.factory`."""

import itertools
import time
import weakref

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.fixtures import tiny_model

_PAUSE = 0.02
_CALLS = itertools.count()
_ALIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.library.custom_op("needing::noise", mutates_args=())
def noise(values: Tensor) -> Tensor:
    """Add unseeded noise unless deterministic algorithms are enabled, which take longer."""
    if torch.are_deterministic_algorithms_enabled():
        time.sleep(_PAUSE)
        return values.clone()
    generator = torch.Generator()
    generator.seed()
    return values + 1e-3 * torch.rand(values.shape, generator=generator)


noise.register_autograd(lambda _ctx, gradient: gradient, setup_context=lambda ctx, inputs, output: None)


class Noise(nn.Module):
    """A module whose noise `torch.use_deterministic_algorithms` disables."""

    def forward(self, values: Tensor) -> Tensor:
        return noise(values)


class Unwritten(nn.Module):
    """A module that reads uninitialized memory. Filling new memory makes it reproducible.

    The contents are made certain: the number of calls so far in all repetitions, which differs between repetitions
    and agrees between replicas.
    """

    def forward(self, values: Tensor) -> Tensor:
        memory = torch.empty(64, 64)
        unseen = memory.numpy()  # by no operator
        if not numpy.isnan(unseen).all():
            unseen[:] = next(_CALLS)
        return values + 1e-3 * memory.nan_to_num(0.5).mean()


class Unpooled(nn.Module):
    """A module without a deterministic implementation, for which strict mode raises."""

    def forward(self, values: Tensor) -> Tensor:
        pooled, positions = nn.functional.max_pool2d(values, 2, return_indices=True)
        return nn.functional.max_unpool2d(pooled, positions, 2)


class UnpooledInEvaluation(Unpooled):
    """The same module, in evaluation only."""

    def forward(self, values: Tensor) -> Tensor:
        return values if self.training else super().forward(values)


class OnReplica1(nn.Module):
    """A wrapper that runs its module on replica 1 only."""

    def __init__(self, fails: nn.Module) -> None:
        super().__init__()
        self.fails = fails

    def forward(self, values: Tensor) -> Tensor:
        return self.fails(values) if dist.get_rank() == 1 else values


class TooLarge(nn.Module):
    """A module that runs out of memory."""

    def forward(self, values: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB.")


def alone(num_classes: int) -> nn.Module:
    """Build a model that needs no flag, but memory: the model before it must be gone."""
    assert not _ALIVE
    model = tiny_model(num_classes)
    model.around = [model]  # a reference cycle: only the garbage collector frees it
    _ALIVE.add(model)
    return model


def mode(num_classes: int) -> nn.Module:
    return nn.Sequential(Noise(), tiny_model(num_classes))


def filling(num_classes: int) -> nn.Module:
    return nn.Sequential(Unwritten(), tiny_model(num_classes))


def refused(num_classes: int) -> nn.Module:
    return nn.Sequential(Unpooled(), tiny_model(num_classes))


def refused_in_evaluation(num_classes: int) -> nn.Module:
    return nn.Sequential(UnpooledInEvaluation(), tiny_model(num_classes))


def refused_on_replica_1(num_classes: int) -> nn.Module:
    return nn.Sequential(OnReplica1(Unpooled()), tiny_model(num_classes))


def refused_in_the_build(num_classes: int) -> nn.Module:
    Unpooled()(torch.zeros(1, 1, 4, 4))
    return tiny_model(num_classes)


def too_large_on_replica_1(num_classes: int) -> nn.Module:
    return nn.Sequential(OnReplica1(TooLarge()), tiny_model(num_classes))
