"""States of the random generators that a step draws from, as digests."""

import _random
import array
import ctypes
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_leaves

from dreplica.diagnosis.tracing.op_signature import tensors_in
from dreplica.state.fingerprint.fingerprint import digest_bytes, digest_tensor

_MT19937_BYTES = 624 * 4 + 4
"""Size of NumPy's `mt19937_state`: 624 words and the position (numpy/random/src/mt19937/mt19937.h)."""


class HostGenerators:
    """Watch on the global generators of Python and NumPy, whose draws are seen only in their states."""

    def __init__(self) -> None:
        generator: Any = numpy.random.mtrand._rand._bit_generator
        peek = type(generator) is numpy.random.MT19937
        # `numpy.random.get_state` takes 70 microseconds, too long for every operator.
        self._address = generator.ctypes.state_address if peek else None
        self._bit_generator = generator
        self._python = _python_state()
        self._numpy = self._numpy_state()

    def drawn(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name of each generator drawn from since the last call, and a digest of its state before that."""
        python, others = _python_state(), self._numpy_state()
        if python != self._python:
            yield "python's random", digest_bytes("", self._python)
        if others != self._numpy:
            yield "numpy.random", digest_bytes("", self._numpy)
        self._python, self._numpy = python, others

    def _numpy_state(self) -> bytes:
        if self._address is not None:
            return ctypes.string_at(self._address, _MT19937_BYTES)
        return repr(self._bit_generator.state).encode()


def drawn_from(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return the digest of the generator that an operator draws from: an argument, or its device's default.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        A digest of 16 bytes.
    """
    generator = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)), None)
    if generator is not None:
        return digest_tensor("", generator.get_state())
    device = kwargs.get("device")  # for operators that create a tensor
    on_gpu = any(tensor.is_cuda for tensor in tensors_in((args, kwargs)))
    on_gpu = on_gpu or (device is not None and torch.device(device).type == "cuda")
    return digest_tensor("", torch.cuda.get_rng_state() if on_gpu else torch.get_rng_state())


def cpu_generator() -> bytes:
    """Return the digest of the state of torch's CPU generator."""
    return digest_tensor("", torch.get_rng_state())


def _python_state() -> bytes:
    # `random.getstate` takes 17 microseconds, too long for every operator. CPython keeps index and words in the object
    # (RandomObject, Modules/_randommodule.c).
    return ctypes.string_at(id(_PYTHON) + object.__basicsize__, _MT19937_BYTES) if _PEEK else _read_python_state()


def _read_python_state() -> bytes:
    words = random.getstate()[1]
    return array.array("I", [words[-1], *words[:-1]]).tobytes()


_PYTHON: Any = random._inst
_PEEK = (
    sys.implementation.name == "cpython"
    and _random.Random.__basicsize__ >= object.__basicsize__ + _MT19937_BYTES
    and ctypes.string_at(id(_PYTHON) + object.__basicsize__, _MT19937_BYTES) == _read_python_state()
)
"""True if the generator's memory has the expected layout."""
