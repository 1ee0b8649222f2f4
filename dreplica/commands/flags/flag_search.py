"""From a strict start to the smallest set of flags, and what is to be told of the way there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreplica.commands.flags.flags import (
    STRICT,
    Flag,
    Variant,
    closed,
    options_on,
    to_paste,
    with_effect_on,
    without_effect_on,
)
from dreplica.commands.flags.measure import Measurements, Outcome, spread
from dreplica.commands.flags.search import give_up
from dreplica.config.schema import DeterminismConfig


@dataclass(frozen=True)
class Row:
    """What came of one setting."""

    variant: Variant
    parted: Outcome | None
    """The first start that did not agree; None if all did."""
    num_starts: int
    ratios: Sequence[float]
    """Time per step over that of strict mode, round by round."""
    as_strict: bool | None
    """Whether it comes to the bits that strict mode comes to; None if it does not come to the same each time."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        parted = self.parted
        return {
            "agrees": parted is None,
            "starts": self.num_starts,
            "parted": None if parted is None else {"between": parted.between, **(parted.verdict or {})},
            "raised": None if parted is None else parted.refused,
            "step_time_to_strict": spread(self.ratios),
            "same_numbers_as_strict": self.as_strict,
        }


@dataclass(frozen=True)
class Study:
    """What was found. Where strict mode itself does not agree, that is all there is: `strict` and nothing else."""

    num_replicas: int
    device: str
    steps: int
    """That each start trained, twice."""
    strict: Row
    flags: Mapping[str, Row] = field(default_factory=dict)
    """Flag, switched off alone, to what came of it."""
    off: Row | None = None
    """All of them switched off."""
    options: Sequence[Row] = ()
    no_effect: Sequence[str] = ()
    """Flags and options that do nothing on this device."""
    not_measured: Sequence[str] = ()
    """Options, each with the reason."""
    smallest: Row | None = None
    smallest_to_off: Sequence[float] = ()
    """Its time per step over that with everything switched off, round by round."""

    @property
    def needed(self) -> list[str]:
        """The smallest set."""
        assert self.smallest is not None
        return [name for name in self.flags if name not in self.smallest.variant.given_up]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = {
            "schema": 1,
            "replicas": self.num_replicas,
            "device": self.device or None,
            "steps": self.steps,
            "strict": self.strict.as_dict(),
        }
        if self.smallest is None or self.off is None:
            return found
        keys, lines = to_paste(self.smallest.variant.given_up, self.device)
        return found | {
            "flags": {name: row.as_dict() | {"needed": name in self.needed} for name, row in self.flags.items()},
            "everything_off": self.off.as_dict(),
            "no_effect": list(self.no_effect),
            "options": [dict([row.variant.option or ("", None)]) | row.as_dict() for row in self.options],
            "not_measured": list(self.not_measured),
            "smallest": self.smallest.as_dict()
            | {
                "flags": self.needed,
                "determinism": dict(keys),
                "shell": lines,
                "step_time_to_everything_off": spread(self.smallest_to_off),
            },
        }


def investigate(measurements: Measurements, own: DeterminismConfig, num_replicas: int, rounds: int, cpus: int) -> Study:
    """Switches the flags off one by one, looks for as many as can be given up together, and tries that once more.

    Args:
        own: the job's section, from which threads, precision and oneDNN are taken.
        rounds: starts in each setting; the first start of all, in strict mode, is one more.
        cpus: for all replicas together.

    Raises UsageError and TrialFailed as `Measurements.start` does.
    """
    first = measurements.start(STRICT)
    device, steps = first.device, first.steps

    def row(variant: Variant) -> Row:
        return Row(
            variant,
            measurements.first_parted(variant),
            measurements.num_starts(variant),
            measurements.ratios(variant, STRICT),
            measurements.same_numbers(variant, STRICT),
        )

    if not first.agrees:
        return Study(num_replicas, device, steps, row(STRICT))
    flags = with_effect_on(device)
    alone = {flag.name: Variant(closed({flag.name})) for flag in flags}
    off = Variant(closed(alone))
    options, not_measured = options_on(device, own, cpus // num_replicas)
    measurements.measure(dict.fromkeys([STRICT, *alone.values(), off, *options]), rounds, beside=[STRICT])
    if not measurements.agrees(STRICT):
        return Study(num_replicas, device, steps, row(STRICT))

    def cost(flag: Flag) -> float:
        found = spread(measurements.ratios(alone[flag.name], STRICT))
        return math.inf if found is None else found["median"]

    def agrees(given_up: frozenset[str]) -> bool:
        variant = Variant(given_up)
        return measurements.agrees(variant) if measurements.of(variant) else measurements.try_out(variant, rounds)

    def confirmed(given_up: frozenset[str]) -> bool:
        variant = Variant(given_up)
        elsewhere = [other for other in (STRICT, off) if other.process != variant.process]
        measurements.measure([*elsewhere, variant], rounds, beside=[STRICT, off])
        return measurements.agrees(variant)

    order = [flag.name for flag in sorted(flags, key=cost)]
    smallest = Variant(give_up(order, agrees, confirmed, closed))
    return Study(
        num_replicas,
        device,
        steps,
        strict=row(STRICT),
        flags={name: row(variant) for name, variant in alone.items()},
        off=row(off),
        options=[row(variant) for variant in options],
        no_effect=without_effect_on(device),
        not_measured=not_measured,
        smallest=row(smallest),
        smallest_to_off=measurements.ratios(smallest, off),
    )
