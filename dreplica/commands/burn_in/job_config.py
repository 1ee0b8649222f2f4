"""The job of a burn-in: the checks of the user's config, and the config of each pass."""

import re
from pathlib import Path
from typing import Any

import numpy

from dreplica.config.schema import RunConfig, SeedConfig
from dreplica.errors import UsageError


def job_of(config: RunConfig) -> RunConfig:
    """Return the config with every stage compared at every step up to the first divergence, and nothing saved.

    Settings that affect the numbers are not changed.
    """
    return _with(
        config,
        agreement={"every": 1, "expect": "identical", "on_divergence": "stop"},
        checkpoint={"every_steps": None, "every_epochs": None},
        report={"tensorboard": False, "wandb": False},
        run={"resume": "never", "stop_after": None, "reference": None},
    )


def pass_of(job: RunConfig, number: int, folder: Path) -> RunConfig:
    """Return the config of one pass.

    Args:
        job: The config from `job_of`.
        number: The number of the pass, from 1. It determines the seeds.
        folder: The folder of the burn-in, in which the pass gets its run folder.
    """
    seeds = pass_seeds(job.seed, number)
    return _with(job, seed=seeds, run={"root": str(folder), "name": f"pass_{number:06}"})


def pass_seeds(base: SeedConfig, number: int) -> dict[str, int]:
    """Return the section `seed` of pass `number`, so that each pass computes different numbers.

    The seeds are drawn by NumPy's SeedSequence from the base seeds and the number, as for the order of an epoch.
    """
    entropy = (base.model, base.data, base.augment, number)
    words = numpy.random.SeedSequence(entropy).generate_state(3)  # type: ignore[arg-type]  # `check_job`: all are ints
    return dict(zip(("model", "data", "augment"), map(int, words), strict=True))


def check_job(config: RunConfig, own: RunConfig, num_replicas: int) -> None:
    """Raise UsageError for a job that cannot judge a device.

    Args:
        config: The config of the job.
        own: The config with the overrides of one replica.
        num_replicas: Number of replicas.

    Raises:
        UsageError: Replicas are not built and run alike, or a setting allows results to vary.
    """
    if num_replicas < 2:
        raise UsageError("--replicas: 1 replica cannot be compared. Start 2 or, to single out one device, 3 or more.")
    seeds, numerics = config.seed, own.determinism
    if not isinstance(seeds.model, int):
        raise UsageError(
            f"seed.model: {_spell(seeds.model)} cannot be used for a burn-in: expected one int, so that replicas are "
            "built alike and a pass can be repeated. Use, for instance, --seed.model 42."
        )
    if seeds.data is None:
        raise UsageError(
            "seed.data: null cannot be used for a burn-in: expected an int, so that a pass can be repeated. "
            "Use, for instance, --seed.data 0."
        )
    # With other settings, software may round differently from time to time, which looks like a fault of the device.
    for key, value, wanted in (
        ("mode", numerics.mode, "strict"),
        ("cudnn_benchmark", numerics.cudnn_benchmark, False),
        ("cudnn_deterministic", numerics.cudnn_deterministic is not False, True),
    ):
        if value != wanted:
            raise UsageError(
                f"determinism.{key}: {_spell(getattr(numerics, key))} cannot be used for a burn-in: expected "
                f"{_spell(wanted)}, so that only the device can cause a difference. Use --determinism.{key} "
                f"{_spell(wanted)}, and a job that runs with it."
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
    """Return the seconds, more than 0, of a duration such as `30m`.

    Raises:
        UsageError: `text` is not a positive number followed by a unit.
    """
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not seconds:
        raise UsageError(
            f"--for: expected a positive number and a unit (s, m, h or d), got {text!r}. For instance --for 30m."
        )
    return seconds


def spell_duration(seconds: float) -> str:
    """Return a duration as text that `parse_duration` reads, rounded, in a suitable unit."""
    unit = next((unit for unit in ("h", "m") if seconds >= 2 * _SECONDS[unit]), "s")
    return f"{seconds / _SECONDS[unit]:.3g}{unit}"
