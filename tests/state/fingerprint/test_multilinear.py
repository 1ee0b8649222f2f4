"""The hash function of GPUs, by its definition: digests differ if a single bit differs."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreplica.state.fingerprint.fingerprint import header
from dreplica.state.fingerprint.multilinear import ALGORITHM, COLUMNS, ROWS, content, digest, mix64, row_keys
from tests.state.fingerprint.test_fingerprint import DTYPES, as_bytes, from_bytes, pattern

BLOCK = 4 * ROWS * COLUMNS


def digest_of(tensor: Tensor, name: str = "t") -> bytes:
    return digest(header(name, tensor.dtype, tensor.shape), as_bytes(tensor).numpy().reshape(-1))


def noise(num_bytes: int) -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, num_bytes, dtype=numpy.uint8)


def both_lanes_differ(one: numpy.ndarray, other: numpy.ndarray) -> bool:
    return all(mine != theirs for mine, theirs in zip(content(one), content(other), strict=True))


# What must differ


def test_constant_tensors_differ() -> None:
    constants = (torch.zeros(5000), torch.ones(5000), torch.full((5000,), 2.0), torch.full((5000,), 3.0))
    assert len({digest_of(tensor) for tensor in constants}) == 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bits_flipped_in_one_word_change_both_lanes(data: st.DataObject) -> None:
    before = noise(data.draw(st.sampled_from([1, 3, 4, 5, 4 * COLUMNS, BLOCK - 1, BLOCK, BLOCK + 2])))
    after = before.copy()
    word = data.draw(st.integers(0, (before.size - 1) // 4))
    flipped = data.draw(st.one_of(st.sampled_from([1, 1 << 15, 1 << 16, 1 << 31]), st.integers(1, 2**32 - 1)))
    mask = numpy.frombuffer(flipped.to_bytes(4, "little"), numpy.uint8)[: before.size - 4 * word]
    after[4 * word : 4 * word + 4] ^= mask
    assert both_lanes_differ(before, after) == bool(mask.any())


@pytest.mark.parametrize("bit", [0, 15, 16, 31])
@pytest.mark.parametrize("first", [0, 7 * COLUMNS + 3])
def test_same_bit_flipped_in_many_words_differs(bit: int, first: int) -> None:
    words = noise(2 * BLOCK).view(numpy.uint32)
    contents = [content(words.view(numpy.uint8))]
    for other in (first + 1, first + COLUMNS, first + 2 * COLUMNS, first + ROWS * COLUMNS, words.size - 1):
        words[[first, other]] ^= 1 << bit  # the flips of the rounds before stay, but the first word's come and go
        contents.append(content(words.view(numpy.uint8)))
    for lane in zip(*contents, strict=True):
        assert len(set(lane)) == len(contents)


def test_sign_flipped_in_any_two_rows_of_a_column_differs() -> None:
    """The weakest case: the sums of row keys for such flips in 2, 4, … 16 words of a column all differ."""
    keys = [[int(key) for key in row_keys(lane)] for lane in (0, 1)]
    chosen = [rows for rows in range(1, 2**ROWS) if rows.bit_count() % 2 == 0]
    for lane, bit in ((0, 31), (1, 15)):
        changes = {sum(keys[lane][row] << bit for row in range(ROWS) if rows >> row & 1) % 2**64 for rows in chosen}
        assert 0 not in changes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_two_different_elements_swapped_differ(data: st.DataObject) -> None:
    tensor = pattern(data.draw(st.integers(2, 300)), data.draw(st.sampled_from(DTYPES)))
    raw = as_bytes(tensor)
    one, two = data.draw(st.tuples(*[st.integers(0, len(raw) - 1)] * 2))
    raw[[one, two]] = raw[[two, one]]
    swapped = from_bytes(raw, tensor)
    assert (digest_of(swapped) == digest_of(tensor)) == torch.equal(as_bytes(swapped), as_bytes(tensor))


@pytest.mark.parametrize("distance", [1, COLUMNS, ROWS * COLUMNS])
def test_swapped_words_differ(distance: int) -> None:
    words = noise(2 * BLOCK).view(numpy.uint32)
    swapped = words.copy()
    swapped[[5, 5 + distance]] = words[[5 + distance, 5]]
    rows = words.reshape(-1, COLUMNS)
    permuted = rows[[1, 0, *range(2, len(rows))]]
    for other in (swapped, permuted, numpy.roll(words, distance)):
        assert both_lanes_differ(words.view(numpy.uint8), other.reshape(-1).view(numpy.uint8))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sign_flips_of_any_even_number_of_elements_differ(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    tensor = torch.arange(4 * COLUMNS).to(dtype)
    spots = st.sets(st.integers(0, tensor.numel() - 1), min_size=2).filter(lambda ids: len(ids) % 2 == 0)
    flipped = tensor.clone()
    flipped[list(data.draw(spots))] *= -1
    assert digest_of(flipped) != digest_of(tensor)


def test_permuted_rows_transpose_and_reshape_differ() -> None:
    matrix = torch.arange(12.0).reshape(4, 3)
    variants = (matrix, matrix[[1, 0, 2, 3]], matrix[:, [1, 0, 2]], matrix.t(), matrix.reshape(3, 4), matrix.flatten())
    assert len({digest_of(tensor) for tensor in variants}) == len(variants)


def test_names_dtypes_and_lengths_count() -> None:
    values = torch.tensor([1.0, 2.0, -3.0, 0.0])
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.complex64)
    assert len({digest_of(values.to(dtype)) for dtype in dtypes}) == len(dtypes)
    assert len({digest_of(values.view(dtype)) for dtype in (torch.float32, torch.int32, torch.uint32)}) == 3
    assert len({digest_of(torch.zeros(size, dtype=torch.bool)) for size in range(9)}) == 9
    one, two = torch.ones(3), torch.zeros(3)
    swapped = {digest_of(one, "a"), digest_of(two, "b")} & {digest_of(two, "a"), digest_of(one, "b")}
    assert not swapped
    assert digest_of(one, "a") != digest_of(one, "b")


def test_different_data_has_independent_digests() -> None:
    """Each of 128 bits changes in about half of 400 pairs of inputs that differ in one low bit."""
    words = numpy.zeros(64, numpy.uint32)
    before = content(words.view(numpy.uint8))
    changed = numpy.zeros(128)
    for number in range(400):
        other = words.copy()
        other[number % 64] ^= 1 << (number // 64)
        after = content(other.view(numpy.uint8))
        bits = (before[0] ^ after[0]) | (before[1] ^ after[1]) << 64
        changed += [bits >> bit & 1 for bit in range(128)]
    assert changed.min() > 140  # six standard deviations
    assert changed.max() < 260


# The definition


def test_content_equals_sum_by_hand() -> None:
    """Computed word by word with Python integers instead of arrays."""
    data = noise(BLOCK + 4 * COLUMNS + 6).tobytes()
    mask = 2**64 - 1

    def mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
        return value ^ value >> 31

    sums = [[0] * (2 * COLUMNS) for _ in range(2)]
    for position in range(0, len(data), 4):
        word = int.from_bytes(data[position : position + 4], "little")
        block, within = divmod(position // 4, ROWS * COLUMNS)
        row, column = divmod(within, COLUMNS)
        for lane, turned in enumerate((word, (word << 16 | word >> 16) & 0xFFFFFFFF)):
            key = mix((2 * row + lane + 1) * 0x9E3779B97F4A7C15 & mask) | 1
            sums[lane][block * COLUMNS + column] += turned * key
    totals = [
        sum(
            mix(total + mix((2 * column + lane + 1) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03 & mask) & mask)
            for column, total in enumerate(sums[lane])
        )
        & mask
        for lane in range(2)
    ]
    assert content(data) == tuple(totals)


def test_mix64_is_a_bijection() -> None:
    """Applying the inverse gives the original values."""
    values = numpy.random.default_rng(0).integers(0, 2**64, 1000, dtype=numpy.uint64)

    def unshift(mixed: numpy.ndarray, by: int) -> numpy.ndarray:
        result = mixed
        for _ in range(64 // by):
            result = mixed ^ (result >> numpy.uint64(by))
        return result

    undone = unshift(mix64(values), 31) * pow(0x94D049BB133111EB, -1, 2**64)
    undone = unshift(undone, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64)
    assert (unshift(undone, 30) == values).all()


GOLDEN = {
    (torch.float32, (16,)): "d07c34d57a5748469bbe7aed90074803",
    (torch.bfloat16, (3, 5)): "73c9eb3aad3d7e14a9ffeb8a81dd98c3",
    (torch.int64, ()): "eef2ee396a810b17e5e62069574551fa",
    (torch.bool, (9,)): "1f558fb49ff9a181ac1c50655fc7a75c",
    (torch.uint8, (0,)): "5460f3e8c01b75f804df3deab640b682",
    (torch.float64, (130, 128)): "f0034f576d2c9963b37d77299d16156b",
}


@pytest.mark.parametrize(("dtype", "shape"), GOLDEN, ids=str)
def test_algorithm_name_matches_known_digests(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """If these values change, `ALGORITHM` must change."""
    assert ALGORITHM == "multilinear-128/1"
    tensor = pattern(torch.Size(shape).numel(), dtype).reshape(shape)
    assert digest_of(tensor, "layer.weight").hex() == GOLDEN[dtype, shape]
