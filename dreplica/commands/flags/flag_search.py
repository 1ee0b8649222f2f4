"""The search from strict mode to the smallest set of flags, and its results."""

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
from dreplica.commands.flags.search import find_disabled
from dreplica.config.schema import DeterminismConfig


@dataclass(frozen=True)
class Row:
    """The result of one setting."""

    variant: Variant
    divergent: Outcome | None
    """The first start that did not agree, None if all did."""
    num_starts: int
    ratios: Sequence[float]
    """Time per step divided by that of strict mode, per round."""
    as_strict: bool | None
    """True if the results equal those of strict mode. None if they differ between starts."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON values."""
        divergent = self.divergent
        return {
            "agrees": divergent is None,
            "starts": self.num_starts,
            "parted": None if divergent is None else {"between": divergent.between, **(divergent.verdict or {})},
            "raised": None if divergent is None else divergent.refused,
            "step_time_to_strict": spread(self.ratios),
            "same_numbers_as_strict": self.as_strict,
        }


@dataclass(frozen=True)
class Study:
    """The results of the search. Only `strict` is set if the job does not agree in strict mode."""

    num_replicas: int
    device: str
    steps: int
    """Number of steps that each start trained, twice."""
    strict: Row
    flags: Mapping[str, Row] = field(default_factory=dict)
    """Flag to the result with this flag alone switched off."""
    off: Row | None = None
    """Result with all flags switched off."""
    options: Sequence[Row] = ()
    no_effect: Sequence[str] = ()
    """Flags and options without an effect on this device."""
    not_measured: Sequence[str] = ()
    """Options that were not measured, each with the reason."""
    smallest: Row | None = None
    smallest_to_off: Sequence[float] = ()
    """Time per step of the smallest set divided by that with everything switched off, per round."""

    @property
    def needed(self) -> list[str]:
        """Flags of the smallest set."""
        assert self.smallest is not None
        return [name for name in self.flags if name not in self.smallest.variant.disabled]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON values."""
        found: dict[str, Any] = {
            "schema": 1,
            "replicas": self.num_replicas,
            "device": self.device or None,
            "steps": self.steps,
            "strict": self.strict.as_dict(),
        }
        if self.smallest is None or self.off is None:
            return found
        keys, lines = to_paste(self.smallest.variant.disabled, self.device)
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
    """Measure each flag alone, search for a largest set of flags to disable together, and confirm it.

    Args:
        measurements: Starts the job.
        own: The `determinism` section of the job, from which threads, precision and oneDNN are taken.
        num_replicas: Number of replicas of each start.
        rounds: Number of starts with each setting. The very first start, in strict mode, is an additional one.
        cpus: Number of CPUs for all replicas together.

    Returns:
        The results.

    Raises:
        UsageError: The job cannot run at all.
        TrialFailed: A start failed.
    """
    first = measurements.start(STRICT)
    device, steps = first.device, first.steps

    def row(variant: Variant) -> Row:
        return Row(
            variant,
            measurements.first_divergent(variant),
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
    measurements.measure(dict.fromkeys([STRICT, *alone.values(), off, *options]), rounds, alongside=[STRICT])
    if not measurements.agrees(STRICT):
        return Study(num_replicas, device, steps, row(STRICT))

    def cost(flag: Flag) -> float:
        found = spread(measurements.ratios(alone[flag.name], STRICT))
        return math.inf if found is None else found["median"]

    def agrees(disabled: frozenset[str]) -> bool:
        variant = Variant(disabled)
        return measurements.agrees(variant) if measurements.of(variant) else measurements.try_out(variant, rounds)

    def confirmed(disabled: frozenset[str]) -> bool:
        variant = Variant(disabled)
        elsewhere = [other for other in (STRICT, off) if other.process != variant.process]
        measurements.measure([*elsewhere, variant], rounds, alongside=[STRICT, off])
        return measurements.agrees(variant)

    order = [flag.name for flag in sorted(flags, key=cost)]
    smallest = Variant(find_disabled(order, agrees, confirmed, closed))
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
