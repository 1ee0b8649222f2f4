"""Two tensors that should be the same, compared element by element."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """How two tensors of equal shape and dtype differ."""

    num_differing: int
    num_elements: int
    first_index: tuple[int, ...]
    first_values: tuple[Any, Any]
    max_ulp: int | None
    """Largest distance in units in the last place: the number of representable values between the two, plus one. None
    for non-floating dtypes, and where a NaN is involved."""
    max_absolute: float | None
    differing_bits: int
    """Bits that differ, over all elements."""

    @property
    def looks_like_bit_flips(self) -> bool:
        """At most 8 bits in at most 8 elements: too few for a rounding difference to have spread."""
        return self.differing_bits <= 8

    def __str__(self) -> str:
        ulp = "" if self.max_ulp is None else f", at most {self.max_ulp} ULP apart"
        absolute = "" if self.max_absolute is None else f" ({self.max_absolute:.3g} absolute)"
        flips = f"; {self.differing_bits} bits differ: looks like bit flips" if self.looks_like_bit_flips else ""
        return (
            f"{self.num_differing} of {self.num_elements} elements differ{ulp}{absolute}, first at index "
            f"{list(self.first_index)}: {self.first_values[0]!r} and {self.first_values[1]!r}{flips}"
        )


def compare_elements(one: Tensor, other: Tensor) -> Difference | None:
    """How `one` differs from `other` (same shape and dtype, on the CPU), bit by bit; None if it does not.

    Raises ValueError for different shapes or dtypes.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        raise ValueError(f"cannot compare {one.dtype} {tuple(one.shape)} with {other.dtype} {tuple(other.shape)}")
    flat_one, flat_other = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    if flat_one.dtype.is_complex:
        flat_one, flat_other = torch.view_as_real(flat_one).reshape(-1), torch.view_as_real(flat_other).reshape(-1)
    bits_one, bits_other = _bits(flat_one), _bits(flat_other)
    differing = (bits_one != bits_other).nonzero().reshape(-1)
    if not len(differing):
        return None
    first = int(differing[0])
    values = flat_one[differing], flat_other[differing]
    return Difference(
        num_differing=len(differing),
        num_elements=flat_one.numel(),
        first_index=tuple(int(i) for i in torch.unravel_index(torch.tensor(first), one.shape)) if one.dim() else (),
        first_values=(flat_one[first].item(), flat_other[first].item()),
        max_ulp=_max_ulp(*values),
        max_absolute=_max_absolute(*values),
        differing_bits=_count_bits(bits_one[differing] ^ bits_other[differing]),
    )


def _bits(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8) if flat.dtype is torch.bool else flat.view(_INTEGERS[flat.element_size()])


def _max_ulp(one: Tensor, other: Tensor) -> int | None:
    """Floats of one sign are ordered as their bits are; flipping the negatives' magnitude orders them all."""
    if not one.dtype.is_floating_point or one.isnan().any() or other.isnan().any():
        return None
    return int((_ordinal(one) - _ordinal(other)).abs().max())


def _ordinal(values: Tensor) -> Tensor:
    """int64, increasing with the value by 1 per representable number; float64's are halved in range, not in step."""
    bits = _bits(values).to(torch.int64)
    if values.element_size() == 1:
        bits = bits.to(torch.int8).to(torch.int64)
    lowest = -(2 ** (8 * values.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


def _max_absolute(one: Tensor, other: Tensor) -> float | None:
    if one.dtype is torch.bool:
        return None
    difference = (one.double() - other.double()).abs()
    return float(difference.max())


def _count_bits(bits: Tensor) -> int:
    count = 0
    remaining = bits.to(torch.int64)
    for _ in range(64):
        count += int((remaining & 1).sum())
        remaining = remaining >> 1
    # An arithmetic shift repeats the sign: narrow dtypes have been sign-extended, so count only their own bits.
    extra = 64 - 8 * bits.element_size()
    if extra and bits.dtype is not torch.uint8:
        count -= extra * int((bits < 0).sum())
    return count
