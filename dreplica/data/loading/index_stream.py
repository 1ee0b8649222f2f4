"""The order of samples: drawn on rank 0 and sent to all replicas, a window of batches at a time."""

from collections.abc import Iterator

import numpy
import torch
from torch import Tensor

from dreplica.distributed.channel import Channel

WINDOW = 256
"""Batches in a window. The next window is sent when one begins, so a loader must read ahead fewer than that many."""


class IndexStream:
    """The index batches of one pass over a data set, the same on every replica.

    As a batch sampler it is read ahead by the loader's workers, at a pace that may differ between replicas. The windows
    are sent at the pace of the training loop (`consumed`), which is the same on all replicas.

    Note:
        Creating it and `consumed` are collective: call them on every rank.

    Args:
        channel: The control channel between all replicas.
        order: Indices in the order of the pass, int64 (num_samples,), on rank 0. None on other ranks.
        num_samples: Number of samples of the pass.
        batch_size: Samples per batch. The last batch may be smaller.
        serial: Number of the pass among all passes of the run (from 1), the same on every replica.
        first: Index of the batch to begin with.
    """

    def __init__(
        self, channel: Channel, order: Tensor | None, num_samples: int, batch_size: int, serial: int, first: int = 0
    ) -> None:
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
        """Return the number of batches of the whole pass, those before `first` included."""
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.batch(number).tolist() for number in range(self.first, len(self)))

    def batch(self, number: int) -> Tensor:
        """Return the sample indices, int64 (batch,), of batch `number` (from 0)."""
        start, end = number * self.batch_size, min((number + 1) * self.batch_size, self.num_samples)
        assert end <= self._received, f"batch {number} was read before its window was sent"
        return self._indices[start:end]

    @property
    def num_received(self) -> int:
        """Number of batches that have been sent so far."""
        return -(-self._received // self.batch_size)  # windows hold whole batches, except the last batch of the pass

    def consumed(self, number: int) -> None:
        """Receive the next window if the training loop has begun the first batch of a window.

        Note:
            Collective: call on every rank, for each batch.
        """
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


class IndexSampler:
    """Draws sample indices on rank 0 for all replicas, depending only on the seed and the epoch.

    Args:
        channel: The control channel between all replicas.
        seed: `seed.data`, used on rank 0.
    """

    def __init__(self, channel: Channel, seed: int) -> None:
        self.seed = seed
        self._channel = channel
        self._passes = 0

    def training_batches(self, num_samples: int, batch_size: int, epoch: int, first: int = 0) -> IndexStream:
        """Return the batches of a training epoch, a new permutation in each epoch.

        Note:
            Collective: call on every rank.

        Args:
            num_samples: Number of training samples.
            batch_size: Samples per batch. The last batch may be smaller.
            epoch: The epoch (from 1).
            first: Index of the batch to begin with.
        """
        order = None
        if self._channel.rank == 0:
            order = draw_order(num_samples, self.seed, epoch)
        return self._stream(order, num_samples, batch_size, first)

    def redraw(self, num_samples: int, batch_size: int, epoch: int, number: int) -> Tensor:
        """Return the sample indices of a batch, drawn again on this rank alone.

        Args:
            num_samples: Number of training samples.
            batch_size: Samples per batch.
            epoch: The epoch (from 1).
            number: Index of the batch in its epoch.

        Returns:
            int64 (batch,).
        """
        start = number * batch_size
        return draw_order(num_samples, self.seed, epoch)[start : start + batch_size]

    def evaluation_batches(self, num_samples: int, batch_size: int) -> IndexStream:
        """Return the batches of an evaluation, all samples in the order of the data set.

        Note:
            Collective: call on every rank.
        """
        order = torch.arange(num_samples) if self._channel.rank == 0 else None
        return self._stream(order, num_samples, batch_size)

    def _stream(self, order: Tensor | None, num_samples: int, batch_size: int, first: int = 0) -> IndexStream:
        self._passes += 1
        return IndexStream(self._channel, order, num_samples, batch_size, self._passes, first)


def draw_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """Draw a permutation of the sample indices for one epoch, without using the global generators.

    An epoch's order does not depend on earlier epochs. It is drawn with NumPy, whose SeedSequence uses all bits of seed
    and epoch (https://numpy.org/doc/stable/reference/random/bit_generators/generated/numpy.random.SeedSequence.html).
    torch's CPU generator keeps only 32 bits of a seed, so different (seed, epoch) would share an order.

    Args:
        num_samples: Number of samples.
        seed: `seed.data`.
        epoch: The epoch (from 1).

    Returns:
        int64 (num_samples,).
    """
    generator = numpy.random.default_rng(numpy.random.SeedSequence((seed, epoch)))
    return torch.from_numpy(generator.permutation(num_samples))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a separate generator for the draws of an epoch's loader (its workers' seeds)."""
    (word,) = numpy.random.SeedSequence((seed, epoch)).generate_state(1)
    return torch.Generator().manual_seed(int(word))
