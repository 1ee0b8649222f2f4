"""Fingerprint of a tensor: 128 bits over its name, dtype, shape and raw bytes.

Bits are hashed, never values: equal digests mean equal bits. NaN is therefore stable (equal NaN bits have equal
digests), and -0.0 differs from +0.0. Bytes are hashed in logical (row-major) order, so the memory layout (strides,
channels_last) does not matter. The hash is the 128-bit variant of XXH3 (https://github.com/Cyan4973/xxHash), computed
over the tensor's own memory: a contiguous CPU tensor is not copied.
"""

from collections.abc import Mapping
from ctypes import c_char
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dreplica.errors import DreplicaError

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALGORITHM = "xxh3-128/1"
"""Name of the hash function in every trace. Digests of different algorithms are never compared."""

WITH_MEMORY = {Tensor, nn.Parameter}
"""Types whose bytes are at `data_ptr`. Those of other subclasses may be elsewhere."""


class UnhashableError(DreplicaError, TypeError):
    """A tensor or another value that cannot be hashed."""

    default_code = "unhashable"


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Compute the fingerprint of each tensor: 128 bits over its name, dtype, shape and bytes.

    ```python
    dreplica.fingerprint(dict(model.named_parameters()))  # {"fc.bias": "bfcb3a13...", ...}
    ```

    Equal fingerprints mean equal bits, not just equal values: -0.0 differs from 0.0, and NaN equals itself. The memory
    layout does not matter. Tensors on a GPU are copied to the CPU.

    Args:
        tensors: Tensors by name, of any shape, dtype and device, strided in any memory layout or sparse COO. The name
            is part of what is hashed.

    Returns:
        Name to 32 hex digits.

    Raises:
        TypeError: If `tensors` is not a mapping of tensors, or if a tensor has no memory (meta, fake or lazy), is
            quantized or nested, or has another layout. The message names the tensor. The exception is also a
            `DreplicaError`.
    """
    if not isinstance(tensors, Mapping):
        kind = type(tensors).__name__
        raise UnhashableError(f"tensors must be a dict such as {{'weight': tensor}}, got {kind}.")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UnhashableError(f"{name!r} must be a tensor, got {type(value).__name__}.", name=name)
    return {name: digest_tensor(name, tensor).hex() for name, tensor in tensors.items()}


def digest_tensor(name: str, tensor: Tensor) -> bytes:
    """Return the fingerprint of a tensor as 16 bytes.

    Raises:
        UnhashableError: If the tensor cannot be hashed, as for `fingerprint`.
    """
    if tensor.layout is torch.sparse_coo:
        whole = tensor.detach().coalesce()
        parts = _content(name, whole.indices()) + _content(name, whole.values())
        return xxhash.xxh3_128_digest(header(name, tensor.dtype, tensor.shape, "sparse_coo") + parts)
    content = _content(name, tensor)
    return xxhash.xxh3_128_digest(header(name, tensor.dtype, tensor.shape) + content)


def digest_bytes(name: str, data: bytes) -> bytes:
    """Return 16 bytes over `name` and `data`, for state that is not a tensor."""
    return xxhash.xxh3_128_digest(name.encode() + b"\0bytes\0" + xxhash.xxh3_128_digest(data))


def num_bytes(tensor: Tensor) -> int:
    """Return the number of raw bytes that the digest of `tensor` covers."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes


@lru_cache(maxsize=65536)
def header(name: str, dtype: torch.dtype, shape: torch.Size, layout: str = "strided") -> bytes:
    """Return what a digest covers in addition to a tensor's bytes.

    Args:
        name: The tensor's name.
        dtype: The tensor's dtype.
        shape: The tensor's shape.
        layout: "strided" or "sparse_coo".
    """
    return f"{name}\0{dtype}\0{tuple(shape)}\0{layout}\0".encode()


def _content(name: str, tensor: Tensor) -> bytes:
    """Return 16 bytes over the tensor's elements in row-major order."""
    try:
        return _digest_memory(tensor) if _is_usual(tensor) else _digest_array(name, tensor)
    except RuntimeError as error:  # a subclass without its own bytes: fake, functional
        text = f"{name!r}: the bytes of this {type(tensor).__name__} cannot be read: {error}"
        raise UnhashableError(text, name=name) from error


def _digest_memory(tensor: Tensor) -> bytes:
    """Return 16 bytes over the tensor's memory, without a copy.

    Not through `tensor.numpy()`: it makes the storage unresizable, and FSDP resizes storages.
    """
    address = tensor.data_ptr()
    if not address and tensor.nbytes:
        raise RuntimeError("it has no memory")
    return xxhash.xxh3_128_digest(cast("Buffer", (c_char * tensor.nbytes).from_address(address)))


def _is_usual(tensor: Tensor) -> bool:
    """Return True if the tensor's memory has its elements in row-major order.

    This is the fast path: most of the hundreds of tensors hashed at every step are of this kind.
    """
    return (
        type(tensor) in WITH_MEMORY
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.is_contiguous()
    )


def _digest_array(name: str, tensor: Tensor) -> bytes:
    """Return 16 bytes over a tensor of another layout, class or device, through a copy if needed."""
    lazy = is_lazy(tensor)
    if lazy or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        kind = "a lazy one" if lazy else f"one of layout {tensor.layout} and dtype {tensor.dtype} on {tensor.device}"
        text = f"{name!r}: a fingerprint needs a strided or sparse COO tensor with memory, got {kind}."
        raise UnhashableError(text, name=name)
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if not tensor.numel():
        return xxhash.xxh3_128_digest(b"")  # a slice without elements has strides that no view as bytes allows
    tensor = tensor.contiguous()
    if type(tensor) in WITH_MEMORY:
        return _digest_memory(tensor)
    return xxhash.xxh3_128_digest(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy()))
