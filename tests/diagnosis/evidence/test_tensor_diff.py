"""compare_elements: ULP distances against a walk from number to number, bit counts, places, and its own words."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreplica.diagnosis.evidence.tensor_diff import Difference, compare_elements

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def difference(one: Tensor, other: Tensor) -> Difference:
    found = compare_elements(one, other)
    assert found is not None
    assert compare_elements(one, one.clone()) is None
    return found


def of_bits(patterns: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor of `dtype` with these bits."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = b"".join(pattern.to_bytes(size, "little") for pattern in patterns)
    return torch.frombuffer(bytearray(raw), dtype=SIZES[size]).view(dtype)


def pattern_of(tensor: Tensor) -> int:
    return int.from_bytes(tensor.reshape(1).view(torch.uint8).numpy().tobytes(), "little")


def step_up(value: Tensor) -> Tensor:
    """The next number of its dtype; torch's own nextafter, which knows bfloat16 and float16 by their tables of bits."""
    infinity = torch.tensor(math.inf, dtype=value.dtype)
    if value.dtype is not torch.float16:
        return torch.nextafter(value, infinity)
    return torch.from_numpy(numpy.nextafter(value.numpy(), infinity.numpy()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("start", [0.0, -0.0, 1.0, -1.0, 0.9990234375, 2.0, "smallest", "-smallest", "-few", "normal"])
def test_ulp_distance_is_the_length_of_the_walk(dtype: torch.dtype, start: float | str) -> None:
    tiny = of_bits([1], dtype).item()
    named = {
        "smallest": tiny,
        "-smallest": -tiny,
        "-few": -5 * tiny,
        "normal": torch.finfo(dtype).smallest_normal,
    }
    first = torch.tensor([named.get(start, start)], dtype=dtype)  # type: ignore[call-overload]
    value = first
    for steps in range(1, 12):
        value = step_up(value)
        assert difference(first, value).max_ulp == steps
        assert difference(value, first).max_ulp == steps


@pytest.mark.parametrize("dtype", FLOATS)
def test_ulp_at_the_edges(dtype: torch.dtype) -> None:
    def ulp(one: float, other: float) -> int | None:
        return difference(torch.tensor([one], dtype=dtype), torch.tensor([other], dtype=dtype)).max_ulp

    largest = torch.finfo(dtype).max
    infinity = pattern_of(torch.tensor(math.inf, dtype=dtype))
    assert ulp(-0.0, 0.0) == 0
    assert ulp(largest, math.inf) == 1
    assert ulp(-math.inf, math.inf) == 2 * infinity  # every number there is; beyond int64 for float64
    assert ulp(0.0, math.inf) == infinity
    assert ulp(math.nan, 1.0) is None


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FLOATS), st.data())
def test_ulp_counts_patterns(dtype: torch.dtype, data: st.DataObject) -> None:
    """Between two numbers of one sign lie as many others as between their bits, read as integers."""
    width = 8 * torch.empty((), dtype=dtype).element_size()
    infinity = pattern_of(torch.tensor(math.inf, dtype=dtype))
    a, b = data.draw(st.lists(st.integers(0, infinity), min_size=2, max_size=2, unique=True))
    sign = 1 << (width - 1)
    assert difference(of_bits([a], dtype), of_bits([b], dtype)).max_ulp == abs(a - b)
    assert difference(of_bits([a | sign], dtype), of_bits([b | sign], dtype)).max_ulp == abs(a - b)
    assert difference(of_bits([a | sign], dtype), of_bits([b], dtype)).max_ulp == a + b


def test_ulp_of_several_elements_is_the_largest() -> None:
    one = torch.tensor([1.0, -3.0, 7.0])
    other = torch.nextafter(one, torch.tensor(math.inf))
    other[1] = torch.nextafter(other[1], torch.tensor(math.inf))
    assert difference(one, other).max_ulp == 2


WIDTHS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from([dtype for dtype in WIDTHS if dtype not in {torch.bool, torch.complex64}]), st.data())
def test_every_differing_bit_is_counted(dtype: torch.dtype, data: st.DataObject) -> None:
    width = 8 * torch.empty((), dtype=dtype).element_size()
    patterns = st.lists(st.integers(0, 2**width - 1), min_size=4, max_size=4)
    one, other = data.draw(patterns), data.draw(patterns)
    expected = sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))
    found = compare_elements(of_bits(one, dtype), of_bits(other, dtype))
    assert (found.differing_bits if found else 0) == expected
    assert (found.num_differing if found else 0) == sum(a != b for a, b in zip(one, other, strict=True))


def test_bits_of_negative_numbers_are_counted_once() -> None:
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        width = 8 * torch.iinfo(dtype).bits // 8
        assert difference(torch.tensor([-1], dtype=dtype), torch.tensor([0], dtype=dtype)).differing_bits == width


@pytest.mark.parametrize("dtype", WIDTHS)
def test_place_and_values(dtype: torch.dtype) -> None:
    one = torch.zeros(3, 4, 5).to(dtype)
    other = one.clone()
    other[1, 2, 3] = True
    other[2, 0, 0] = True
    found = difference(one, other)
    assert (found.num_differing, found.num_elements) == (2, 60)
    assert found.first_index == (1, 2, 3)
    assert found.first_values == (one[0, 0, 0].item(), other[1, 2, 3].item())


def test_complex_numbers_are_single_elements() -> None:
    one = torch.zeros(2, 3, dtype=torch.complex64)
    other = one.clone()
    other[1, 0] = complex(3, 4)
    other[1, 2] = complex(0, 1e-45)
    found = difference(one, other)
    assert (found.num_differing, found.num_elements, found.first_index) == (2, 6, (1, 0))
    assert found.first_values == (0j, 3 + 4j)
    assert found.max_absolute == 5.0
    smallest_imaginary = difference(one[1, 2], other[1, 2])
    assert (smallest_imaginary.max_ulp, smallest_imaginary.first_index) == (1, ())


def test_conjugate_views_are_compared_by_value() -> None:
    one = torch.tensor([1 + 2j]).conj()
    assert compare_elements(one, torch.tensor([1 - 2j])) is None
    assert difference(one, torch.tensor([1 + 2j])).max_absolute == 4.0


def test_scalars_and_empty_tensors() -> None:
    found = difference(torch.tensor(1.0), torch.tensor(2.0))
    assert (found.first_index, found.num_elements, found.max_ulp) == ((), 1, 2**23)
    assert compare_elements(torch.zeros(0), torch.zeros(0)) is None
    assert compare_elements(torch.zeros(2, 0, 3, dtype=torch.complex64), torch.zeros(2, 0, 3).cfloat()) is None


def test_layout_does_not_matter() -> None:
    one = torch.arange(24.0).reshape(2, 3, 2, 2)
    last = one.to(memory_format=torch.channels_last)
    assert compare_elements(one, last) is None
    last = last.clone()
    last[1, 0, 1, 0] = -1
    assert difference(one, last).first_index == (1, 0, 1, 0)


@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_sparse_tensors() -> None:
    one = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.tensor([1.0, 2.0]), (5,))
    other = torch.sparse_coo_tensor(torch.tensor([[3, 1]]), torch.tensor([2.5, 1.0]), (5,))
    found = difference(one, other)
    assert (found.first_index, found.first_values) == ((3,), (2.0, 2.5))


def test_nan_bits_count_but_nan_has_no_distance() -> None:
    one = of_bits([0x7FC00000, 0x3F800000], torch.float32)
    assert compare_elements(one, one.clone()) is None
    found = difference(one, of_bits([0x7FC00001, 0x3F800000], torch.float32))
    assert (found.num_differing, found.max_ulp, found.max_absolute) == (1, None, None)
    assert "nan" in str(found)
    assert "ULP" not in str(found)


def test_integers_beyond_what_a_double_holds() -> None:
    found = difference(torch.tensor([2**60]), torch.tensor([2**60 + 1]))
    assert (found.max_absolute, found.max_ulp) == (1.0, None)
    extremes = torch.tensor([-(2**63)]), torch.tensor([2**63 - 1])
    assert difference(*extremes).max_absolute == float(2**64 - 1)
    one = torch.tensor([2**63 + 5], dtype=torch.uint64)
    assert difference(one, torch.tensor([2**63 - 1], dtype=torch.uint64)).max_absolute == 6.0
    assert difference(torch.tensor([True]), torch.tensor([False])).max_absolute is None


def test_infinities() -> None:
    assert difference(torch.tensor([math.inf]), torch.tensor([-math.inf])).max_absolute == math.inf


def flip(tensor: Tensor, bits: list[tuple[int, int]]) -> Tensor:
    """A copy with bit `bit` of element `index` flipped, for each (index, bit)."""
    copy = tensor.clone()
    view = copy.reshape(-1).view(SIZES[tensor.element_size()])
    width = 8 * tensor.element_size()
    for index, bit in bits:
        view[index] ^= (1 << bit) - (1 << width if bit == width - 1 and width > 8 else 0)
    return copy


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float64, 64)])
def test_flips_that_rounding_cannot_reach_look_like_flips(dtype: torch.dtype, width: int) -> None:
    tensor = torch.linspace(0.5, 3.0, 50).to(dtype)
    exponent_and_sign = range(width - 9, width)
    for bit in exponent_and_sign:
        found = difference(tensor, flip(tensor, [(7, bit)]))
        assert found.differing_bits == 1
        assert found.looks_like_bit_flips
        assert "1 bit differs: looks like bit flips" in str(found)
    assert difference(tensor, flip(tensor, [(i, width - 2) for i in range(8)])).looks_like_bit_flips
    assert not difference(tensor, flip(tensor, [(i, width - 2) for i in range(9)])).looks_like_bit_flips


def test_rounding_differences_do_not_look_like_flips() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator)
    in_order, reversed_order = torch.zeros(()), torch.zeros(())
    for a, b in zip(values, values.flip(0), strict=True):
        in_order, reversed_order = in_order + a, reversed_order + b
    assert not difference(in_order, reversed_order).looks_like_bit_flips
    one = torch.tensor([1.0])
    assert not difference(one, torch.nextafter(one, torch.tensor(2.0))).looks_like_bit_flips
    assert not difference(torch.tensor([0.0]), torch.tensor([-0.0])).looks_like_bit_flips


def test_integers_and_flips() -> None:
    assert not difference(torch.tensor([4]), torch.tensor([5])).looks_like_bit_flips  # a counter one further on
    assert not difference(torch.tensor([1000]), torch.tensor([300])).looks_like_bit_flips  # another index
    assert difference(torch.tensor([4]), torch.tensor([4 + 2**40])).looks_like_bit_flips
    assert not difference(torch.tensor([True]), torch.tensor([False])).looks_like_bit_flips


def test_words() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    other = one.clone()
    other[1, 0] = 3.0000002
    assert str(difference(one, other)) == (
        "1 of 4 elements differ, at most 1 ULP apart (2.38e-07 absolute), first at index [1, 0]: 3.0 and "
        "3.000000238418579"
    )


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_what_cannot_be_compared(other: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot compare"):
        compare_elements(torch.zeros(2), other)


def test_packed_numbers_are_compared_as_bytes() -> None:
    one, other = (torch.tensor(values, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for values in ([1, 2], [1, 6]))
    found = difference(one, other)
    assert (found.num_differing, found.first_index, found.first_values, found.differing_bits) == (1, (1,), (2, 6), 1)
