"""Tests of shifts and flips of a batch: drawn for each sample separately, equal on both code paths."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreplica.data.images.batch_augment import ShiftFlip


def noise(num: int, height: int = 6, width: int = 5) -> Tensor:
    return torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4), st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 10**9), min_size=1))
def test_batch_equals_single_samples_on_both_paths(padding: int, seed: int, epoch: int, indices: list[int]) -> None:
    images, move = noise(len(indices)), ShiftFlip(padding)
    whole = move(images.clone(), seed, epoch, indices)
    alone = [move(image[None].clone(), seed, epoch, [index]) for image, index in zip(images, indices, strict=True)]
    gathered = move.on_device(images.clone(), *move.draw(seed, epoch, indices))
    assert whole.numpy().tobytes() == torch.cat(alone).numpy().tobytes() == gathered.numpy().tobytes()
    assert whole.is_contiguous()
    assert gathered.is_contiguous()


def test_window_is_where_it_was_drawn() -> None:
    images, move = noise(40), ShiftFlip(2)
    flips, tops, lefts = move.draw(0, 1, range(40))
    moved = move(images.clone(), 0, 1, range(40))
    for image, found, flip, top, left in zip(images, moved, flips, tops, lefts, strict=True):
        for y in range(6):
            for x in range(5):
                source_y, source_x = y + top - 2, (4 - x if flip else x) + left - 2
                inside = 0 <= source_y < 6 and 0 <= source_x < 5
                expected = image[:, source_y, source_x] if inside else torch.zeros(3)
                assert found[:, y, x].tolist() == expected.tolist()


@pytest.mark.parametrize("padding", [0, 4])
def test_draws_are_uniform_and_independent(padding: int) -> None:
    num, sides = 40_000, 2 * padding + 1
    flips, tops, lefts = ShiftFlip(padding).draw(3, 5, range(num))
    cells = (flips * sides + tops) * sides + lefts
    counts = numpy.bincount(cells, minlength=2 * sides**2)
    assert len(counts) == 2 * sides**2
    expected = num / len(counts)
    # chi-squared, at 6 standard deviations
    assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 6 * (2 * len(counts)) ** 0.5
    # neighbours in index, epoch and seed, too
    for other in (ShiftFlip(padding).draw(3, 6, range(num)), ShiftFlip(padding).draw(4, 5, range(num))):
        assert abs((flips == other[0]).mean() - 0.5) < 0.02
    # as are what a sample and the next one draw
    draws = numpy.stack([flips, tops, lefts][: 3 if padding else 1])
    related = numpy.corrcoef(draws[:, :-1], draws[:, 1:]) - numpy.eye(2 * len(draws))
    assert abs(related).max() < 0.03


def test_the_stream_is_splitmix64() -> None:
    # The first outputs of the published generator for the seed 1234567, by their upper halves
    # (https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64).
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]

    class Seed:
        def __init__(self, _entropy: object) -> None: ...

        def generate_state(self, *_: object) -> object:
            return numpy.array([1234567], dtype=numpy.uint64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy.random, "SeedSequence", Seed)
        flips, tops, lefts = ShiftFlip(500).draw(0, 0, [0])
    uppers = [output >> 32 for output in outputs]
    assert [bool(flips[0]), int(tops[0]), int(lefts[0])] == [
        uppers[0] >= 2**31,
        uppers[1] * 1001 >> 32,
        uppers[2] * 1001 >> 32,
    ]
