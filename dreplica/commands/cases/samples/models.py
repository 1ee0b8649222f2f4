"""Small models, one correct and the others each with a fault in its forward pass, for `model.factory`."""

import itertools
import os
import time

import numpy
import torch
from torch import Tensor, nn

from dreplica.commands.cases.samples.operators import racy_sum
from dreplica.distributed.process_group import env_rank


def tiny_cnn(num_classes: int) -> nn.Sequential:
    """Return convolution, BatchNorm, dropout and a head, for images of shape (3, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * 8 * 8, num_classes),
    )


class _Wrapped(nn.Module):
    """`tiny_cnn` inside a model whose forward pass does something more."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = tiny_cnn(num_classes)
        self.replica_id = env_rank()

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


class RacySum(nn.Module):
    """A module that pools (N, C, H, W) to (N, C) with an operator that adds in order of arrival."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the sum over height and width."""
        return racy_sum(images)


def racy_pooling(num_classes: int) -> nn.Module:
    """Return a model that pools with a nondeterministic operator: no seed makes runs equal."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), RacySum(), nn.Linear(8, num_classes)
    )


class _DetachedLogits(_Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        # requires_grad_() is what people add when torch says that the loss does not require a gradient.
        return self.body(images).detach().requires_grad_()


def detached_logits(num_classes: int) -> nn.Module:
    """Return a model with detached logits: backward() succeeds, but no parameter gets a gradient.

    BatchNorm's statistics change nevertheless, as in every training-mode forward pass, so the state_dict changes from
    step to step although nothing is learned.
    """
    return _DetachedLogits(num_classes)


class _BranchesByRank(_Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        logits = self.body(images)
        return logits.clamp(-0.5, 0.5) if self.replica_id == 1 else logits


def branches_by_rank(num_classes: int) -> nn.Module:
    """Return a model whose forward pass runs one more operator on replica 1, in a branch on the rank."""
    return _BranchesByRank(num_classes)


class _ScalesByRank(_Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.body(images * (1.0 + 1e-6 * self.replica_id))


def scales_by_rank(num_classes: int) -> nn.Module:
    """Return a model that multiplies its input by a number that depends on the rank."""
    return _ScalesByRank(num_classes)


class _PadsWithGarbage(_Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        # What any process leaves in its heap: random numbers here, so that the case does not depend on chance.
        litter = [bytearray((os.urandom(2) + b"\x80\x3e") * (images.nbytes // 4)) for _ in range(8)]
        del litter
        padded = torch.empty(images.shape)
        padded[..., :-1] = images[..., :-1]
        return self.body(padded)


def pads_with_garbage(num_classes: int) -> nn.Module:
    """Return a model that copies its input to new memory, except the last column, which stays unwritten."""
    return _PadsWithGarbage(num_classes)


_libraries: list[torch.library.Library] = []
"""Keeps registered kernels alive: torch removes them together with their library."""


def _addmm_in_bfloat16(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return bias * beta + alpha * (a.bfloat16().float().unsqueeze(-1) * b.bfloat16().float()).sum(1)


def registers_a_kernel(num_classes: int) -> nn.Module:
    """Return a correct model, and register another kernel for `aten::addmm` on replica 1, as a library may."""
    if env_rank() == 1:
        library = torch.library.Library("aten", "IMPL")
        library.impl("addmm", _addmm_in_bfloat16, "CPU")
        _libraries.append(library)
    return tiny_cnn(num_classes)


class _MonitorsOnce(_Wrapped):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        # A replay restores numbers, but not the position of an iterator.
        self._calls = itertools.count(1)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and next(self._calls) == 3 and self.replica_id == 1:
            with torch.no_grad():
                self.body[1](self.body[0](images * 0.5))
        return self.body(images)


def monitors_once(num_classes: int) -> nn.Module:
    """Return a model whose third training step on replica 1 runs a part once more, which moves BatchNorm's statistics.

    This is what happens when monitoring code looks at activations in training mode.
    """
    return _MonitorsOnce(num_classes)


class _StaysInTraining(_Wrapped):
    def train(self, mode: bool = True) -> "_StaysInTraining":
        super().train(mode or self.replica_id == 1)
        return self


def stays_in_training(num_classes: int) -> nn.Module:
    """Return a model that ignores eval() on replica 1, so that BatchNorm and dropout stay active.

    Weights and buffers agree when the evaluation begins; the predictions do not.
    """
    return _StaysInTraining(num_classes)


class _Fails(_Wrapped):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.num_forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.num_forwards += self.training
        if self.replica_id == 1 and self.num_forwards == 3:
            raise RuntimeError("out of memory, say")
        return self.body(images)


def fails_on_third_step(num_classes: int) -> nn.Module:
    """Return a model that raises an exception in the third training step of replica 1."""
    return _Fails(num_classes)


def own_random_weights(num_classes: int) -> nn.Module:
    """Return a model with a layer whose weights come from an unseeded NumPy generator.

    The global generators are seeded and equal on all replicas before and after, and have no part in it.
    """
    model = tiny_cnn(num_classes)
    generator = numpy.random.default_rng()
    with torch.no_grad():
        weights = model.get_parameter("0.weight")
        weights.copy_(torch.from_numpy(generator.normal(0.0, 0.2, tuple(weights.shape))))
    return model


class BatchSums(nn.Module):
    """Sums over a whole batch, each over enough values for the CPU to divide it among its threads."""

    num_values = 2**17
    """Lowest number of values in a sum. torch sums up to 32768 values on one thread."""

    def __init__(self, num_sums: int) -> None:
        super().__init__()
        self.num_sums = num_sums

    def forward(self, images: Tensor) -> Tensor:
        """Return the sums of differently scaled images, shape (num_sums,)."""
        values = images.flatten().repeat(-(-self.num_values // images.numel()))
        # Some sums may round to the same value in both orders of addition. That all of them do is unlikely.
        return torch.stack([(values * (2 + number) ** 0.5).sum() for number in range(self.num_sums)])


class _ScaledBySums(_Wrapped):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.sums = BatchSums(4 * num_classes)

    def forward(self, images: Tensor) -> Tensor:
        sums = self.sums(images).reshape(4, -1) / BatchSums.num_values
        return self.body(nn.functional.adaptive_avg_pool2d(images, 8)) * sums.sum(dim=0)


def scaled_by_sums(num_classes: int) -> nn.Module:
    """Return a model whose logits are scaled by sums that depend on the number of threads."""
    return _ScaledBySums(num_classes)


def flag_changed(num_classes: int) -> nn.Module:
    """Return a model, after setting a numerics flag on replica 1, as an imported library may."""
    if env_rank() == 1:
        torch.set_float32_matmul_precision("medium")
    return tiny_cnn(num_classes)


class _ReseedsEveryStep(_Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.body(images)


def reseeds_every_step(num_classes: int) -> nn.Module:
    """Return a model that seeds torch in every forward pass, which repeats all later draws.

    Dropout's mask is the same in every step, and a sampler over the global generator would draw one order for ever.
    """
    return _ReseedsEveryStep(num_classes)


class _WarmsUpByTheClock(_Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return self.body(images) * (1.0 + 1e-3 * (time.time() % 1.0))


def warms_up_by_the_clock(num_classes: int) -> nn.Module:
    """Return a model that multiplies its output by a factor that depends on the time of day."""
    return _WarmsUpByTheClock(num_classes)
