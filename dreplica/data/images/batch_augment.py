"""Augmentation of whole batches that moves pixels and computes none, so that every device gives the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from dreplica.state.tensors import to_device

_GAMMA = numpy.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class ShiftFlip:
    """A random crop of the padded image in the old size, and a random horizontal flip.

    The draws of sample i are the outputs 3i, 3i + 1 and 3i + 2 of a SplitMix64 stream (Steele, Lea and Flood 2014,
    https://doi.org/10.1145/2714064.2660195) seeded from (seed, epoch). So they depend only on (seed, epoch, i), and a
    whole batch is computed at once.
    """

    padding: int = 0
    """Number of black pixels added on each side before the crop. 0 flips only."""

    def __call__(self, images: Tensor, seed: int, epoch: int, indices: Sequence[int]) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8 (batch, 3, H, W). It may be overwritten.
            seed: `seed.augment`.
            epoch: The epoch (from 1).
            indices: Index in the data set of each image.

        Returns:
            uint8 (batch, 3, H, W) on the device of `images`.
        """
        flips, tops, lefts = self.draw(seed, epoch, indices)
        if images.device.type == "cpu":
            return self.on_cpu(images, flips, tops, lefts)
        return self.on_device(images, flips, tops, lefts)

    def draw(self, seed: int, epoch: int, indices: Sequence[int]) -> tuple[NDArray[numpy.bool_], ...]:
        """Draw for each sample whether it is flipped, and where its window is.

        Args:
            seed: `seed.augment`.
            epoch: The epoch (from 1).
            indices: Index in the data set of each sample.

        Returns:
            Flips (bool), top rows and left columns (int64, 0 to 2 * padding), each (batch,).
        """
        (start,) = numpy.random.SeedSequence((seed, epoch)).generate_state(1, numpy.uint64)
        places = 3 * numpy.asarray(indices, dtype=numpy.uint64)[:, None] + numpy.arange(1, 4, dtype=numpy.uint64)
        words = start + places * _GAMMA
        words = (words ^ (words >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        words = (words ^ (words >> numpy.uint64(31))) >> numpy.uint64(32)
        shifts = (words[:, 1:] * numpy.uint64(2 * self.padding + 1) >> numpy.uint64(32)).astype(numpy.int64)
        return words[:, 0] >= 2**31, shifts[:, 0], shifts[:, 1]

    def on_cpu(self, images: Tensor, flips: NDArray, tops: NDArray, lefts: NDArray) -> Tensor:
        """Augment image by image, which on the CPU is 20 times as fast as a gather.

        Args:
            images: uint8 (batch, 3, H, W) on the CPU. It may be overwritten.
            flips: True for each image to flip, (batch,).
            tops: Top row of each window, (batch,).
            lefts: Left column of each window, (batch,).
        """
        source = images.numpy()
        if self.padding == 0:
            for row in flips.nonzero()[0].tolist():
                source[row] = source[row, :, :, ::-1].copy()
            return images
        height, width = images.shape[-2:]
        padded = numpy.pad(source, ((0, 0), (0, 0), *(((self.padding, self.padding),) * 2)))
        result = numpy.empty_like(source)
        for row, flip, top, left in zip(range(len(source)), flips, tops.tolist(), lefts.tolist(), strict=True):
            window = padded[row, :, top : top + height, left : left + width]
            result[row] = window[:, :, ::-1] if flip else window
        return torch.from_numpy(result)

    def on_device(self, images: Tensor, flips: NDArray, tops: NDArray, lefts: NDArray) -> Tensor:
        """Augment by one gather for the batch, without waiting for the device.

        Args:
            images: uint8 (batch, 3, H, W) on any device.
            flips: True for each image to flip, (batch,).
            tops: Top row of each window, (batch,).
            lefts: Left column of each window, (batch,).
        """
        device, (height, width) = images.device, images.shape[-2:]
        ys = tops[:, None] + numpy.arange(height)
        xs = lefts[:, None] + numpy.where(flips[:, None], numpy.arange(width)[::-1], numpy.arange(width))
        rows, columns = (to_device(torch.from_numpy(places), device) for places in (ys, xs))
        batch, channels = (torch.arange(size, device=device) for size in images.shape[:2])
        padded = pad(images, (self.padding,) * 4)
        return padded[
            batch[:, None, None, None],
            channels[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
