"""`dreplica flags`: which determinism flags a job needs, and what each costs."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dreplica.commands.flags.flag_search import Study, investigate
from dreplica.commands.flags.measure import Measurements, TrialFailed
from dreplica.commands.flags.print_results import print_study
from dreplica.commands.scratch_folder import fresh_folder
from dreplica.config.load import load_config
from dreplica.config.schema import AgreementConfig, RunConfig
from dreplica.distributed.signals import signals_as_interrupts
from dreplica.environment.hardware import cpu_limit
from dreplica.errors import ExitCode, UsageError
from dreplica.state.rng import shares_model_seed


def find_flags(
    settings: Sequence[str],
    num_replicas: int,
    steps: int,
    rounds: int,
    as_json: bool = False,
    keep: Path | None = None,
    timeout: float = 1800.0,
) -> ExitCode:
    """Find a smallest set of determinism flags with which the job agrees, and print it.

    Args:
        settings: The config settings of the job, as for `dreplica train`.
        num_replicas: Number of replicas of each start.
        steps: Number of steps of each training.
        rounds: Number of starts with each setting.
        as_json: Print all results as JSON.
        keep: An empty or new folder, in which the folders of all starts are kept.
        timeout: Seconds until a start is terminated.

    Returns:
        AGREED if a set was found. DIVERGED if the job diverges even in strict mode, UNUSABLE if an operator raises in
        strict mode, FAILED if a start fails for another reason or the command is interrupted.

    Raises:
        UsageError: The config cannot be used.
    """
    config = _job(settings, num_replicas)
    progress = Console(stderr=True)

    def show_progress(line: str) -> None:
        progress.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        with signals_as_interrupts(), fresh_folder(keep, "flags") as root:
            measurements = Measurements(config, num_replicas, steps, root, timeout, show_progress)
            found = investigate(measurements, config.determinism, num_replicas, rounds, _num_cpus())
    except TrialFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        print("error: interrupted; all starts were terminated", file=sys.stderr)
        return ExitCode.FAILED
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print_study(Console(), found)
    return _exit_code(found)


def _job(settings: Sequence[str], num_replicas: int) -> RunConfig:
    """Return the config of the job with every step compared. Raise UsageError if its replicas differ on purpose."""
    config = load_config(settings, num_replicas)
    for key, value in (("overrides", config.overrides), ("inject", config.inject)):
        if value:
            raise UsageError(
                f"{key}: {value} makes replicas differ with any flags. Remove it with --{key} "
                + ("{}" if key == "overrides" else "[]"),
                code="replicas-differ",
                key=key,
            )
    if not shares_model_seed(config.seed, num_replicas):
        raise UsageError(
            f"seed.model: expected one seed for all replicas, got {config.seed.model!r}. Use, for instance, "
            "--seed.model 42.",
            code="replicas-differ",
            key="seed.model",
        )
    agreement = AgreementConfig(snapshot_every=config.agreement.snapshot_every)
    seed = config.seed if config.seed.data is not None else config.seed.model_copy(update={"data": 0})
    return config.model_copy(update={"agreement": agreement, "seed": seed})


def _exit_code(found: Study) -> ExitCode:
    if found.strict.divergent is None:
        return ExitCode.AGREED
    return ExitCode.DIVERGED if found.strict.divergent.refused is None else ExitCode.UNUSABLE


def _num_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    limit = cpu_limit()
    cpus = len(os.sched_getaffinity(0))
    return cpus if limit is None else max(1, min(cpus, int(limit)))
