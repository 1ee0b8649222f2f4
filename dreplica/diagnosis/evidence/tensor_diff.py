"""Comparison of two tensors that should be equal, element by element."""

import math
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS_SET = torch.tensor([value.bit_count() for value in range(256)])
_MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class Difference:
    """How two tensors of equal shape and dtype differ."""

    num_differing: int
    num_elements: int
    first_index: tuple[int, ...]
    first_values: tuple[Any, Any]
    max_ulp: int | None
    """Largest distance in units in the last place: how many steps to the next representable number lead from one to the
    other. 0 between -0.0 and +0.0, which differ in a bit but not in value; 1 between the largest number and infinity;
    of complex numbers, the larger of real and imaginary part. None for other dtypes, and where a NaN is involved."""
    max_absolute: float | None
    """Largest absolute difference; None for bool, and where a NaN is involved."""
    differing_bits: int
    """Bits that differ, over all elements."""
    looks_like_bit_flips: bool
    """True if at most 8 bits differ in all, and only bits that rounding does not reach: the upper half of the mantissa,
    the exponent or the sign. A flip of a lower bit cannot be distinguished from rounding. For integers, True if one bit
    above the lowest 8 differs. Never True for bool."""

    def __str__(self) -> str:
        ulp = "" if self.max_ulp is None else f", at most {self.max_ulp} ULP apart"
        absolute = "" if self.max_absolute is None else f" ({self.max_absolute:.3g} absolute)"
        bits = "1 bit differs" if self.differing_bits == 1 else f"{self.differing_bits} bits differ"
        flips = f"; {bits}: looks like bit flips" if self.looks_like_bit_flips else ""
        return (
            f"{self.num_differing} of {self.num_elements} elements differ{ulp}{absolute}, first at index "
            f"{list(self.first_index)}: {self.first_values[0]!r} and {self.first_values[1]!r}{flips}"
        )


def compare_elements(one: Tensor, other: Tensor) -> Difference | None:
    """Compare two tensors bit by bit.

    Args:
        one: A tensor on the CPU. A sparse tensor is compared as its dense equivalent.
        other: A tensor of the same shape and dtype, on the CPU.

    Returns:
        How the tensors differ, or None if all bits are equal.

    Raises:
        ValueError: For different shapes or dtypes.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        raise ValueError(
            f"cannot compare {one.dtype} {tuple(one.shape)} with {other.dtype} {tuple(other.shape)}; give two tensors "
            "of one dtype and shape"
        )
    flat_one, flat_other = _flat(one), _flat(other)
    parts_one, parts_other = _parts(flat_one), _parts(flat_other)
    bits_one, bits_other = _bits(parts_one), _bits(parts_other)
    differs = bits_one != bits_other
    per_element = differs.reshape(len(flat_one), -1).any(dim=1) if len(flat_one) else differs
    elements, parts = per_element.nonzero().reshape(-1), differs.nonzero().reshape(-1)
    if not len(elements):
        return None
    first = int(elements[0])
    differing_bits = _count_bits(bits_one[parts] ^ bits_other[parts])
    max_ulp = _max_ulp(parts_one[parts], parts_other[parts])
    max_absolute = _max_absolute(flat_one[elements], flat_other[elements])
    return Difference(
        num_differing=len(elements),
        num_elements=len(flat_one),
        first_index=tuple(int(i) for i in numpy.unravel_index(first, tuple(one.shape))),
        first_values=(flat_one[first].item(), flat_other[first].item()),
        max_ulp=max_ulp,
        max_absolute=max_absolute,
        differing_bits=differing_bits,
        looks_like_bit_flips=_looks_like_bit_flips(parts_one.dtype, differing_bits, max_ulp, max_absolute),
    )


def _looks_like_bit_flips(dtype: torch.dtype, bits: int, max_ulp: int | None, max_absolute: float | None) -> bool:
    if dtype.is_floating_point:
        # A NaN on one side only is an exponent of ones; the sign of a zero is 0 ULP and may come from rounding.
        return bits <= 8 and (max_ulp is None or max_ulp >= 2 ** math.ceil(_MANTISSA_BITS.get(dtype, 2) / 2))
    return bits == 1 and max_absolute is not None and max_absolute >= 2**8


def _flat(tensor: Tensor) -> Tensor:
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    if dense.dtype is torch.float4_e2m1fn_x2:  # two numbers in a byte, which torch does not take apart
        dense = dense.view(torch.uint8)
    return dense.resolve_conj().resolve_neg().contiguous().reshape(-1)


def _parts(flat: Tensor) -> Tensor:
    """Return real and imaginary parts in turn."""
    return torch.view_as_real(flat).reshape(-1) if flat.dtype.is_complex else flat


def _bits(flat: Tensor) -> Tensor:
    return flat.view(_INTEGERS[flat.element_size()])


def _max_ulp(one: Tensor, other: Tensor) -> int | None:
    if not one.dtype.is_floating_point or _has_nan(one, other):
        return None
    return _largest_distance(_ordinal(one), _ordinal(other))


def _ordinal(values: Tensor) -> Tensor:
    """Map each float to an int64 that increases by 1 per representable number. Both zeros are 0.

    Floats of one sign are ordered as their bits are; turning the negatives' around orders them all.
    """
    bits = _bits(values)
    signed = bits.view(torch.int8) if bits.dtype is torch.uint8 else bits
    lowest = torch.iinfo(signed.dtype).min
    signed = signed.to(torch.int64)
    return torch.where(signed < 0, lowest - signed, signed)


def _largest_distance(one: Tensor, other: Tensor) -> int:
    # Two int64 may lie further apart than int64 reaches; unsigned arithmetic, which wraps around, holds the difference.
    high, low = torch.maximum(one, other).numpy(), torch.minimum(one, other).numpy()
    return int((high.astype(numpy.uint64) - low.astype(numpy.uint64)).max())


def _max_absolute(one: Tensor, other: Tensor) -> float | None:
    if one.dtype is torch.bool or _has_nan(one, other):
        return None
    if one.dtype.is_complex:
        return float((one.to(torch.complex128) - other.to(torch.complex128)).abs().max())
    if one.dtype.is_floating_point:
        return float((one.double() - other.double()).abs().max())
    if one.dtype is torch.uint64:
        # int64 cannot hold its upper half. Moving both values down keeps their difference.
        one, other = (tensor.view(torch.int64) ^ torch.iinfo(torch.int64).min for tensor in (one, other))
    return float(_largest_distance(one.to(torch.int64), other.to(torch.int64)))


def _has_nan(one: Tensor, other: Tensor) -> bool:
    if not (one.dtype.is_floating_point or one.dtype.is_complex):
        return False
    if one.element_size() == 1:
        one, other = one.float(), other.float()
    return bool(one.isnan().any() or other.isnan().any())


def _count_bits(bits: Tensor) -> int:
    found = torch.bincount(bits.view(torch.uint8), minlength=256)
    return int((found * _BITS_SET).sum())
