"""The coordinator: rank 0 draws the order of samples and sends it to all, a window of batches at a time."""

from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from dreplica.distributed.channel import Channel

WINDOW = 256
"""Batches in a window. The next one is sent when a window is begun, so a loader may read ahead less than that far."""


class IndexStream:
    """The index batches of one pass over a data set, the same on every replica.

    As a batch sampler it is read ahead by the loader's workers, at a pace that may differ between replicas; the windows
    are sent at the pace of the training loop (`consumed`), which is the same on all. Creating it and `consumed` are
    collectives. `serial`: which of its coordinator's passes this is, from 1: the same on every replica.
    """

    def __init__(
        self, channel: Channel, order: Tensor | None, num_samples: int, batch_size: int, serial: int, first: int = 0
    ) -> None:
        """`order`: (num_samples,) int64, on rank 0; `first`: the batch to begin with."""
        assert (order is None) == (channel.rank != 0), "rank 0 draws the order, and only rank 0"
        self.serial = serial
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.first = first
        self._channel = channel
        self._order = order
        self._indices = torch.empty(num_samples, dtype=torch.int64)
        self._received = 0
        for _ in range(first // WINDOW + 2):
            self._receive()

    def __len__(self) -> int:
        """Batches of the whole pass."""
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.batch(number).tolist() for number in range(self.first, len(self)))

    def batch(self, number: int) -> Tensor:
        """The sample indices of batch `number` (from 0), int64."""
        start, end = number * self.batch_size, min((number + 1) * self.batch_size, self.num_samples)
        assert end <= self._received, f"batch {number} was read before its window was sent"
        return self._indices[start:end]

    @property
    def num_received(self) -> int:
        """How many batches have been sent so far."""
        return self._received // self.batch_size

    def consumed(self, number: int) -> None:
        """The loop has begun batch `number`: at the first of a window, receives the next window."""
        if number % WINDOW == 0 and number > self.first:
            self._receive()

    def _receive(self) -> None:
        start, end = self._received, min(self._received + WINDOW * self.batch_size, self.num_samples)
        if start == end:
            return
        window = self._indices[start:end]
        if self._order is not None:
            window.copy_(self._order[start:end])
        self._channel.broadcast(window)
        self._received = end


class Coordinator:
    """Draws on rank 0, for all replicas, from `seed` and the epoch alone."""

    def __init__(self, channel: Channel, seed: int) -> None:
        self.seed = seed
        self._channel = channel
        self._passes = 0

    def training_batches(self, num_samples: int, batch_size: int, epoch: int, first: int = 0) -> IndexStream:
        """A new permutation each epoch (from 1), from batch `first` on; the last may be smaller. A collective."""
        order = None
        if self._channel.rank == 0:
            order = draw_order(num_samples, self.seed, epoch)
        return self._stream(order, num_samples, batch_size, first)

    def redraw(self, num_samples: int, batch_size: int, epoch: int, number: int) -> Tensor:
        """The sample indices (int64) of batch `number` of an epoch, drawn again on this rank. No collective."""
        start = number * batch_size
        return draw_order(num_samples, self.seed, epoch)[start : start + batch_size]

    def evaluation_batches(self, num_samples: int, batch_size: int) -> IndexStream:
        """All samples in their own order. A collective."""
        order = torch.arange(num_samples) if self._channel.rank == 0 else None
        return self._stream(order, num_samples, batch_size)

    def _stream(self, order: Tensor | None, num_samples: int, batch_size: int, first: int = 0) -> IndexStream:
        self._passes += 1
        return IndexStream(self._channel, order, num_samples, batch_size, self._passes, first)


def draw_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """A permutation of the sample indices, int64, for one epoch of one seed; the global generators are not touched.

    An epoch's order does not depend on how it was reached. Drawn with NumPy, whose SeedSequence takes in seed and epoch
    whole (https://numpy.org/doc/stable/reference/random/bit_generators/generated/numpy.random.SeedSequence.html):
    torch's CPU generator keeps only 32 bits of a seed, so different (seed, epoch) would share an order.
    """
    generator = numpy.random.default_rng(numpy.random.SeedSequence((seed, epoch)))
    return torch.from_numpy(generator.permutation(num_samples))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator of its own for what an epoch's loader draws (its workers' seeds)."""
    (word,) = numpy.random.SeedSequence((seed, epoch)).generate_state(1)
    return torch.Generator().manual_seed(int(word))
