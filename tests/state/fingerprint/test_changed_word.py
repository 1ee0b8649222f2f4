"""A changed word is recovered from digests alone, and nothing else is taken for one."""

import random

import numpy
import pytest
import torch

from dreplica.state.fingerprint import multilinear
from dreplica.state.fingerprint.changed_word import (
    _unmix64,
    changed_bytes,
    find_changed_word,
    recover_tensor,
)

BLOCK = 4 * multilinear.ROWS * multilinear.COLUMNS


def content(size: int, seed: int = 0) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, size, dtype=numpy.uint8)


def found(data: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray | None:
    word = find_changed_word(data, multilinear.digest(b"w", data), multilinear.digest(b"w", other))
    return None if word is None else changed_bytes(data, word)


def test_unmix64_inverts_mix64() -> None:
    values = numpy.random.default_rng(1).integers(0, 2**64, 1000, dtype=numpy.uint64)
    assert (_unmix64(multilinear.mix64(values)) == values).all()


@pytest.mark.parametrize("size", [1, 3, 4, 6, 1000, BLOCK, BLOCK + 2, 3 * BLOCK, 40 * BLOCK + 123])
def test_find_changed_word_recovers_flipped_bits(size: int) -> None:
    data = content(size)
    draw = random.Random(size)
    for bits in (1, 1, 2, 8, 32):
        word = draw.randrange(-(-size // 4))
        width = 8 * min(4, size - 4 * word)
        other = data.copy()
        for bit in draw.sample(range(width), min(bits, width)):
            other[4 * word + bit // 8] ^= 1 << bit % 8
        recovered = found(data, other)
        assert recovered is not None
        assert recovered.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
def test_recover_tensor_restores_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    gone = tensor.clone()
    gone.view(-1)[-1] = 0
    digests = [multilinear.digest(b"w", each.reshape(-1).view(torch.uint8).numpy()) for each in (tensor, gone)]
    recovered = recover_tensor(tensor, *digests)
    assert recovered is not None
    assert (recovered.dtype, recovered.shape) == (dtype, shape)
    assert torch.equal(recovered, gone)


def test_find_changed_word_is_none_for_more_words() -> None:
    data = content(5 * BLOCK)
    for count in (2, 3, 100):
        other = data.copy()
        for word in random.Random(count).sample(range(5 * BLOCK // 4), count):
            other[4 * word] ^= 1
        assert found(data, other) is None
    column = data.copy()  # two words of one column of one block
    column[0] ^= 1
    column[4 * multilinear.COLUMNS] ^= 1
    assert found(data, column) is None


def test_find_changed_word_is_none_without_a_change() -> None:
    data = content(BLOCK)
    assert found(data, data.copy()) is None
    assert found(content(0), content(0)) is None


def test_find_changed_word_is_none_for_other_hash_functions() -> None:
    data = content(BLOCK)
    for seed in range(20):
        digests = (content(16, seed).tobytes(), content(16, 100 + seed).tobytes())
        assert find_changed_word(data, *digests) is None
