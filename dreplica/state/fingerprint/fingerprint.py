"""128 bits over one tensor's name, dtype, shape and raw bytes.

Never over values: equal digests mean equal bits. So NaN is stable (the same NaN bits have the same digest) and -0.0
differs from +0.0. The bytes are taken in logical (row-major) order, so the memory layout (strides, channels_last) does
not matter. The hash is XXH3's 128-bit variant (https://github.com/Cyan4973/xxHash), run over the tensor's own memory:
a contiguous CPU tensor is not copied.
"""

from collections.abc import Mapping
from ctypes import c_char
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALGORITHM = "xxh3-128/1"
"""Names the function in every trace: digests of different algorithms are never compared."""

ABSENT = b"\0" * 16
"""The digest of something that is not there (a gradient that is None)."""

WITH_MEMORY = {Tensor, nn.Parameter}
"""Other subclasses may not have their bytes where their `data_ptr` says."""


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The fingerprint of each tensor: name to 32 hex digits.

    Any shape, dtype and device; strided in any memory layout, or sparse COO. Raises TypeError, naming the tensor, for
    one without memory (on the meta device, fake, or lazy), a quantized or nested one, or one in another layout.
    """
    if not isinstance(tensors, Mapping):
        kind = type(tensors).__name__
        raise TypeError(f"fingerprints are taken of tensors by name, {{'weight': tensor}}, not of a {kind}")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name!r}: a fingerprint is taken of a tensor, not of a {type(value).__name__}")
    return {name: digest_tensor(name, tensor).hex() for name, tensor in tensors.items()}


def digest_tensor(name: str, tensor: Tensor) -> bytes:
    """16 bytes over name, dtype, shape and raw bytes of `tensor`. Raises TypeError as `fingerprint` does."""
    if tensor.layout is torch.sparse_coo:
        whole = tensor.detach().coalesce()
        parts = _content(name, whole.indices()) + _content(name, whole.values())
        return xxhash.xxh3_128_digest(header(name, tensor.dtype, tensor.shape, "sparse_coo") + parts)
    content = _content(name, tensor)
    return xxhash.xxh3_128_digest(header(name, tensor.dtype, tensor.shape) + content)


def digest_bytes(name: str, data: bytes) -> bytes:
    """16 bytes over `name` and `data`, for state that is not a tensor."""
    return xxhash.xxh3_128_digest(name.encode() + b"\0bytes\0" + xxhash.xxh3_128_digest(data))


def num_bytes(tensor: Tensor) -> int:
    """How many raw bytes the digest of `tensor` covers."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes


@lru_cache(maxsize=65536)
def header(name: str, dtype: torch.dtype, shape: torch.Size, layout: str = "strided") -> bytes:
    """What a digest covers besides a tensor's bytes."""
    return f"{name}\0{dtype}\0{tuple(shape)}\0{layout}\0".encode()


def _content(name: str, tensor: Tensor) -> bytes:
    """16 bytes over the tensor's elements in row-major order."""
    try:
        return _digest_memory(tensor) if _is_usual(tensor) else _digest_array(name, tensor)
    except RuntimeError as error:  # a subclass whose bytes are not its own: fake, functional
        raise TypeError(f"{name!r}: the bytes of this {type(tensor).__name__} cannot be read: {error}") from error


def _digest_memory(tensor: Tensor) -> bytes:
    """Reads it where it is; a tensor whose NumPy array was ever asked for could not be resized any more."""
    address = tensor.data_ptr()
    if not address and tensor.nbytes:
        raise RuntimeError("it has no memory")
    return xxhash.xxh3_128_digest(cast("Buffer", (c_char * tensor.nbytes).from_address(address)))


def _is_usual(tensor: Tensor) -> bool:
    """Whether its memory has its elements in row-major order as it is: what is hashed by the hundreds at every step."""
    return (
        type(tensor) in WITH_MEMORY
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested)
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.is_contiguous()
    )


def _digest_array(name: str, tensor: Tensor) -> bytes:
    """Of a tensor that is not usual: in another layout, of another class, or on another device."""
    lazy = is_lazy(tensor)
    if lazy or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        raise TypeError(
            f"{name!r}: a fingerprint needs a strided or sparse COO tensor with memory, not "
            + ("a lazy one" if lazy else f"one of layout {tensor.layout} and dtype {tensor.dtype} on {tensor.device}")
        )
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
