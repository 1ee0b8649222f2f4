"""Use of the global generators of Python and NumPy, which many scripts neither seed nor draw from.

A script that seeds only torch has other states of these two generators on every rank and in every run. That is harmless
as long as nothing draws from them. So their states are compared once something has drawn from them, and until then the
fact that nothing has.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dreplica.agreement.trace.line import GENERATORS
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.state.draws import MOST_DRAWS, draws_between
from dreplica.state.stages import Entry, digest_entry, rng_entries

MOST_FLIPPED_BITS = 64
"""Bits of a state up to which a fault of memory may have changed it."""
_NOT_DRAWN = b"not drawn from"
_NAMES = {"python": "Python's `random`", "numpy": "NumPy's global generator"}
_SEED = {"python": "random.seed(0)", "numpy": "numpy.random.seed(0)"}


class GeneratorUse:
    """Record of the generators that were drawn from since this object was created.

    Args:
        drawn: Names of generators that were drawn from before, such as in the run that is resumed.

    Attributes:
        not_drawn: Names of the generators that nothing has drawn from so far.
        states: Name of each generator to its state when `entries` was called last.
    """

    def __init__(self, drawn: Collection[str] = ()) -> None:
        self._first = dict(rng_entries())
        self.states: Mapping[str, Tensor | bytes | None] = self._first
        self.not_drawn = frozenset(GENERATORS) - frozenset(drawn)

    def resume(self, not_drawn: Collection[str]) -> None:
        """Take over from an interrupted run which generators it had not drawn from."""
        self.not_drawn &= frozenset(not_drawn)

    @property
    def first_digests(self) -> dict[str, str]:
        """The digest of the state of each of `GENERATORS` when this object was created."""
        return {name: digest_entry(name, self._first[name]).hex() for name in GENERATORS}

    def entries(self) -> list[Entry]:
        """Return the entries of the stage `rng`, with a constant for each generator that was not drawn from."""
        entries = rng_entries()
        self.states = dict(entries)
        self.not_drawn -= {name for name, state in entries if name in self.not_drawn and state != self._first[name]}
        return [(name, _NOT_DRAWN if name in self.not_drawn else state) for name, state in entries]


def describe_unseeded(names: Collection[str]) -> str:
    """Return the message about generators that differ between ranks before the first step."""
    listed = " and ".join(_NAMES[name] for name in GENERATORS if name in names)
    verb = "differ" if len(names) > 1 else "differs"
    return (
        f"{listed} {verb} between ranks at the start, and will be compared only once something draws from them. To "
        f"seed them on every rank: {seed_commands(names)}"
    )


def seed_commands(names: Collection[str]) -> str:
    """Return the Python statements that seed the generators."""
    return "; ".join(_SEED[name] for name in GENERATORS if name in names)


def differing(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the names of the generators whose first states differ between ranks.

    Args:
        rows: For each rank, generator name to the digest of its first state.
    """
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, digest in row.items():
            values.setdefault(name, set()).add(digest)
    return [name for name in GENERATORS if len(values.get(name, ())) > 1]


def compare_states(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> list[Evidence]:
    """Return a line for each generator whose states code has moved apart, and not a few flipped bits.

    Args:
        names: The generators that differ between replicas.
        rows: For each replica, generator to its state, packed as in the stage `rng`, where it is known.
    """
    lines = []
    for name in names:
        states = [_packed(row.get(name)) for row in rows]
        other = next((replica for replica, state in enumerate(states) if state != states[0]), 0)
        if not other or None in states:
            continue
        one, two = states[0], states[other]
        data = {"generator": name, "replicas": [0, other]}
        draws = draws_between(one, two)
        if draws:  # 0 leaves a flipped bit of the seed or of a cached number possible
            direction = "further" if draws > 0 else "less far"
            lines.append(Evidence.of("generators-drawn-apart", direction=direction, draws=abs(draws), **data))
            continue
        bits = sum((a ^ b).bit_count() for a, b in zip(one, two, strict=False))
        if len(one) == len(two) and bits > MOST_FLIPPED_BITS:
            lines.append(Evidence.of("generators-seeded-apart", bits=bits, most=MOST_DRAWS, **data))
    return lines


def _packed(state: Any) -> Any:
    return state.cpu().numpy().tobytes() if isinstance(state, Tensor) else state
