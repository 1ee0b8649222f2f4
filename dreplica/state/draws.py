"""The number of draws that leads from one state of a random generator to another.

A generator that was drawn from on one replica only is behind or ahead of the others' by the draws. A fault of memory
leads to a state that no small number of draws reaches: it changes words of the twister without moving its position.
"""

import ast
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from torch import Tensor

MOST_DRAWS = 10_000
"""Number of 32-bit outputs up to which a state counts as reached by draws."""
_NUM_WORDS = 624
"""Words of the Mersenne twister: https://doi.org/10.1145/272991.272995."""
_TORCH_CPU_BYTES = 5056
_TORCH_CUDA_BYTES = 16


def draws_between(one: Any, other: Any, most: int = MOST_DRAWS) -> int | None:
    """Count the draws that lead from one state of a generator to another.

    Args:
        one: A state as the generator returns it: `random.getstate()`, `numpy.random.get_state()`, the `state` of a
            NumPy bit generator, `torch.get_rng_state()` or `torch.cuda.get_rng_state()`; or as `rng_entries` packs it.
        other: A state of the same kind.
        most: Largest number of draws to try.

    Returns:
        The number of 32-bit outputs, of a GPU's generator the distance of the offsets. Negative if the draws lead from
        `other` to `one`, 0 if only a cached normal number was used. None if no such number of draws leads from one
        state to the other.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return _numpy_draws(one, other, most)
    states = _as_bytes(one), _as_bytes(other)
    if all(isinstance(state, bytes) and len(state) == _TORCH_CUDA_BYTES for state in states):
        return _offset_draws(*states, most)
    twisters = [_Twister.of(state) for state in states]
    if twisters[0] is None or twisters[1] is None:
        return None
    return _twister_draws(twisters[0], twisters[1], most)


def draws_apart(one: Mapping[str, Any], other: Mapping[str, Any], most: int = MOST_DRAWS) -> dict[str, int]:
    """Return the generators whose states differ by draws, with the draws from `one` to `other`.

    Args:
        one: States by name, as `get_rng_state` returns them.
        other: States of the same generators.
        most: Largest number of draws to try.
    """
    found = {}
    for name in one.keys() & other.keys():
        if not same_generator_state(one[name], other[name]):
            count = draws_between(one[name], other[name], most)
            if count is not None:
                found[name] = count
    return dict(sorted(found.items()))


def same_generator_state(one: Any, other: Any) -> bool:
    """Return True if two states of one generator are equal, in any form."""
    return _comparable(one) == _comparable(other)


class _Twister:
    """A state of a Mersenne twister.

    Args:
        words: The 624 words, uint32.
        position: Words of them that were drawn, 0 to 624.
        cached: The cached normal number, None without.
    """

    def __init__(self, words: Sequence[int] | numpy.ndarray, position: int, cached: Any) -> None:
        self.words = numpy.asarray(words).astype(numpy.uint32)
        self.position = position
        self.cached = cached

    @classmethod
    def of(cls, state: Any) -> "_Twister | None":
        if isinstance(state, bytes):
            return cls._of_torch(state) if len(state) == _TORCH_CPU_BYTES else cls.of(_unpacked(state))
        if not isinstance(state, tuple) or len(state) < 3:
            return None
        if state[0] == "MT19937":
            return cls(state[1], state[2], state[4] if state[3] else None)
        if isinstance(state[1], tuple) and len(state[1]) == _NUM_WORDS + 1:
            return cls(state[1][:-1], state[1][-1], state[2])
        return None

    @classmethod
    def _of_torch(cls, state: bytes) -> "_Twister | None":
        # aten/src/ATen/CPUGeneratorImpl.cpp: seed, left, seeded, next, words, a cached double and a cached float.
        left, _, following = struct.unpack_from("<iiQ", state, 8)
        if not 1 <= left <= _NUM_WORDS or following not in ({_NUM_WORDS + 1 - left} if left > 1 else {0, _NUM_WORDS}):
            return None  # a fault has changed one of the two
        words = numpy.frombuffer(state, numpy.uint64, _NUM_WORDS, 24)
        cached_double, cached_float = struct.unpack_from("<i", state, 5040)[0], state[5052]
        cached = (state[5016:5040] if cached_double else None, state[5048:5052] if cached_float else None)
        return cls(words, _NUM_WORDS + 1 - left, cached if any(cached) else None)

    def twisted(self) -> numpy.ndarray:
        """Return the next 624 words."""
        generator = numpy.random.MT19937(0)
        generator.state = {"bit_generator": "MT19937", "state": {"key": self.words, "pos": _NUM_WORDS}}
        generator.random_raw()
        return generator.state["state"]["key"]


def _twister_draws(one: _Twister, other: _Twister, most: int) -> int | None:
    count = _draws_ahead(one, other, most)
    if count is None:
        count = _draws_ahead(other, one, most)
        count = None if count is None else -count
    if count == 0 and one.cached is not None and other.cached is not None and one.cached != other.cached:
        return None  # no draw replaces one cached number by another
    return count


def _draws_ahead(one: _Twister, other: _Twister, most: int) -> int | None:
    """Return the draws that lead from one state forward to the other, or None."""
    current, count = one, other.position - one.position
    while count <= most:
        if count >= 0 and numpy.array_equal(current.words, other.words):
            return count
        current = _Twister(current.twisted(), 0, None)
        count += _NUM_WORDS
    return None


def _offset_draws(one: bytes, other: bytes, most: int) -> int | None:
    # aten/src/ATen/cuda/CUDAGeneratorImpl.cpp: the seed, and the offset of the Philox generator.
    (seed, start), (other_seed, end) = struct.unpack("<Qq", one), struct.unpack("<Qq", other)
    return end - start if seed == other_seed and abs(end - start) <= most else None


def _numpy_draws(one: dict[str, Any], other: dict[str, Any], most: int) -> int | None:
    name = one.get("bit_generator")
    kind = getattr(numpy.random, str(name), None)
    if name != other.get("bit_generator") or kind is None:
        return None
    width = 1 if name == "MT19937" else 2  # the others draw 64 bits at a time
    for sign, (start, end) in ((1, (one, other)), (-1, (other, one))):
        generator = kind(0)
        generator.state = start
        wanted = _comparable(end["state"]), end.get("buffer_pos", 0)
        for count in range(most // width + 1):
            state = generator.state
            if (_comparable(state["state"]), state.get("buffer_pos", 0)) == wanted:
                return sign * count * width
            generator.random_raw()
    return None


def _as_bytes(state: Any) -> Any:
    return state.cpu().numpy().tobytes() if isinstance(state, Tensor) else state


def _unpacked(state: bytes) -> Any:
    """Return a state of Python's or NumPy's generator that `dreplica.state.stages.rng_entries` has packed."""
    for size, start in ((4 * _NUM_WORDS + 4, b"("), (4 * _NUM_WORDS, b"('MT19937'")):
        if state[size : size + len(start)] != start:
            continue
        try:
            rest = ast.literal_eval(state[size:].decode())
        except (SyntaxError, ValueError):
            continue
        words = numpy.frombuffer(state, numpy.uint32, size // 4)
        if len(rest) == 2:
            return rest[0], tuple(words.tolist()), rest[1]
        return rest[0], words, *rest[1:]
    return None


def _comparable(state: Any) -> Any:
    if isinstance(state, Tensor | numpy.ndarray):
        return _as_bytes(state) if isinstance(state, Tensor) else state.tobytes()
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items()}
    return tuple(_comparable(item) for item in state) if isinstance(state, tuple) else state
