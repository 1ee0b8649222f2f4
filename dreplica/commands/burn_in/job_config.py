"""The job of a burn-in: what is asked of the user's config, and what becomes of it in each pass."""

import re
from pathlib import Path
from typing import Any

import numpy

from dreplica.config.schema import RunConfig, SeedConfig
from dreplica.errors import UsageError


def job_of(config: RunConfig) -> RunConfig:
    """The config with every stage compared at every step, up to the first difference, and nothing saved or sent away.

    What decides the numbers stays as it is.
    """
    return _with(
        config,
        agreement={"every": 1, "expect": "identical", "on_divergence": "stop"},
        checkpoint={"every_steps": None, "every_epochs": None},
        report={"tensorboard": False, "wandb": False},
        run={"resume": "never", "stop_after": None, "reference": None},
    )


def pass_of(job: RunConfig, number: int, folder: Path) -> RunConfig:
    """The job as pass `number` (from 1) runs it: with seeds of its own, recorded in a folder within `folder`."""
    seeds = pass_seeds(job.seed, number)
    return _with(job, seed=seeds, run={"root": str(folder), "name": f"pass_{number:06}"})


def pass_seeds(base: SeedConfig, number: int) -> dict[str, int]:
    """The keys of `seed` in pass `number`: other weights, order and augmentation, so that other numbers are computed.

    Drawn by NumPy's SeedSequence from the base seeds and the number, as for the order of an epoch.
    """
    entropy = (base.model, base.data, base.augment, number)
    words = numpy.random.SeedSequence(entropy).generate_state(3)  # type: ignore[arg-type]  # `check_job`: all are ints
    return dict(zip(("model", "data", "augment"), map(int, words), strict=True))


def check_job(config: RunConfig, own: RunConfig, num_replicas: int) -> None:
    """Raises UsageError for a job by which no card can be judged. `own`: with one replica's overrides."""
    if num_replicas < 2:
        raise UsageError("--replicas: 1 has nothing to be compared with. Start 2 or, to name one card, 3 and more.")
    seeds, numerics = config.seed, own.determinism
    if not isinstance(seeds.model, int):
        raise UsageError(
            f"seed.model: {_spell(seeds.model)} will not do for a burn-in: all replicas must be built alike, and a "
            "pass be repeatable. Give one int, such as --seed.model 42."
        )
    if seeds.data is None:
        raise UsageError("seed.data: null will not do for a burn-in: a pass must be repeatable. Give --seed.data 0.")
    # Otherwise software may round otherwise from time to time, and would be taken for a fault of the card.
    for key, value, wanted in (
        ("mode", numerics.mode, "strict"),
        ("cudnn_benchmark", numerics.cudnn_benchmark, False),
        ("cudnn_deterministic", numerics.cudnn_deterministic is not False, True),
    ):
        if value != wanted:
            raise UsageError(
                f"determinism.{key}: {_spell(getattr(numerics, key))} will not do for a burn-in: what differs must be "
                f"the card's doing. Use --determinism.{key} {_spell(wanted)}, with a job that runs so."
            )


def _with(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    )


def _spell(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def parse_duration(text: str) -> float:
    """Seconds, more than 0, of what is written as a number and a unit. Raises UsageError."""
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not seconds:
        raise UsageError(
            f"--for: {text!r} will not do: expected a number and a unit (s, m, h or d). For instance --for 30m."
        )
    return seconds


def spell_duration(seconds: float) -> str:
    """As `parse_duration` reads it, in the unit that suits, rounded."""
    unit = next((unit for unit in ("h", "m") if seconds >= 2 * _SECONDS[unit]), "s")
    return f"{seconds / _SECONDS[unit]:.3g}{unit}"
