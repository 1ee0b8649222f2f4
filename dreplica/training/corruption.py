"""Corruption of tensors: flipped bits and scaled elements, invisible to autograd and to dispatch modes."""

import random

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dreplica.config.schema import FaultConfig
from dreplica.errors import UsageError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def corrupt(tensor: Tensor, fault: FaultConfig, draw: random.Random) -> None:
    """Corrupt a tensor in place as a fault describes.

    Args:
        tensor: The tensor.
        fault: The element and the bits to flip, or the factor to scale an element with.
        draw: Chooses the element and the bits that the fault leaves open.

    Raises:
        UsageError: The tensor does not have the element or the bit, or its elements cannot be scaled.
    """
    check_fits(tensor, fault)
    if fault.scale is None:
        flip_bits(tensor, fault.bits, draw, fault.element, fault.bit)
    else:
        scale_element(tensor, fault.scale, draw, fault.element)


def flip_bits(
    tensor: Tensor, bits: int, draw: random.Random, element: int | None = None, bit: int | None = None
) -> None:
    """Flip bits of a tensor in place, without autograd, version counters or dispatch modes noticing.

    Args:
        tensor: The tensor.
        bits: Number of different bits to flip; all if the tensor, or the element, has fewer.
        draw: Chooses the bits.
        element: Position of the element whose bits to flip, in row-major order. None for any elements.
        bit: The one bit to flip, from 0 for the lowest. None for any bits.
    """
    with _disable_current_modes(), torch.no_grad():
        data = tensor.data
        if data.is_complex():
            data = torch.view_as_real(data.conj() if data.is_conj() else data)
        flat = data.view(_INTEGERS[data.element_size()]) if data.dtype is not torch.bool else data.view(torch.uint8)
        width = width_of(tensor)
        places = range(tensor.numel() * width) if element is None else range(element * width, (element + 1) * width)
        if bit is not None:
            places = places[bit::width]
        number_width = 1 if data.dtype is torch.bool else 8 * data.element_size()
        for place in draw.sample(places, min(bits, len(places))):
            index = torch.unravel_index(torch.tensor(place // number_width), flat.shape) if flat.dim() else ()
            flipped = place % number_width
            # The sign bit cannot be written as a positive number of a signed dtype.
            is_sign = flipped == 8 * flat.element_size() - 1 and flat.dtype is not torch.uint8
            flat[index] = flat[index] ^ (-(1 << flipped) if is_sign else 1 << flipped)


def scale_element(tensor: Tensor, factor: float, draw: random.Random, element: int | None = None) -> None:
    """Multiply one element of a tensor, without autograd, version counters or dispatch modes noticing.

    Args:
        tensor: The tensor, of a floating-point or complex dtype.
        factor: The factor.
        draw: Chooses the element.
        element: Position of the element, in row-major order. None for one that the factor changes, if there is one.
    """
    with _disable_current_modes(), torch.no_grad():
        data = tensor.data
        if element is None:
            changed = ((data * factor) != data).flatten().nonzero().flatten().tolist()
            element = draw.choice(changed or range(data.numel()))
        index = torch.unravel_index(torch.tensor(element), data.shape) if data.dim() else ()
        data[index] = data[index] * factor


def width_of(tensor: Tensor) -> int:
    """Return the number of bits of an element that hold its value."""
    return 1 if tensor.dtype is torch.bool else 8 * tensor.element_size()


def check_fits(tensor: Tensor, fault: FaultConfig) -> None:
    """Check that a fault can be injected into a tensor.

    Raises:
        UsageError: The tensor does not have the element or the bit, or its elements cannot be scaled.
    """
    check_range(fault, tensor.numel(), width_of(tensor))
    if fault.scale is not None and not (tensor.is_floating_point() or tensor.is_complex()):
        raise UsageError(
            f"inject: scale={fault.scale:g}: the elements of {fault.target} are {tensor.dtype}, which cannot be "
            "scaled. Use bit.",
            code="unscalable-target",
            target=fault.target,
            scale=fault.scale,
        )


def check_range(fault: FaultConfig, num_elements: int, num_bits: int) -> None:
    """Check that a target has the element and the bit of a fault.

    Args:
        fault: The fault.
        num_elements: Number of elements of the target.
        num_bits: Number of bits of an element.

    Raises:
        UsageError: It has not.
    """
    for key, value, size in (("element", fault.element, num_elements), ("bit", fault.bit, num_bits)):
        if value is not None and value >= size:
            raise UsageError(
                f"inject: expected {key} from 0 to {size - 1} in {fault.tensor or fault.target}, got {value}.",
                code="no-such-place",
                target=fault.target,
                key=key,
                value=value,
                size=size,
            )
