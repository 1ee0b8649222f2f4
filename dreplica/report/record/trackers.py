"""Write results to experiment trackers, TensorBoard and Weights & Biases, on rank 0."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.config.schema import ReportConfig
from dreplica.distributed.failure import describe_exception
from dreplica.errors import UsageError
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.training.events import EpochDone

log = logging.getLogger(__name__)


class _Tracker(Protocol):
    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, verdict: Verdict | None) -> None: ...


class Trackers:
    """The experiment trackers enabled in the config.

    A tracker that raises is disabled with a warning. The state of all random number generators is preserved.

    Args:
        config: The section `report` of the config.
        folder: The run folder.
        name: Name of the run.
        run_config: The whole config, which trackers record.
    """

    def __init__(self, config: ReportConfig, folder: Path, name: str, run_config: Mapping[str, Any]) -> None:
        openers: dict[str, Callable[[], _Tracker]] = {}
        if config.tensorboard:
            openers["tensorboard"] = lambda: _TensorBoard(folder)
        if config.wandb:
            openers["wandb"] = lambda: _WeightsAndBiases(folder, name, run_config)
        self._open: dict[str, _Tracker] = {}
        for key, opener in openers.items():
            with self._guarded(key):
                self._open[key] = opener()

    def epoch(self, done: EpochDone) -> None:
        """Write the results of an epoch."""
        values = _scalars(done)
        for key, tracker in list(self._open.items()):
            with self._guarded(key):
                tracker.scalars(values, done.step)

    def close(self, verdict: Verdict | None) -> None:
        """Write the verdict and close the trackers."""
        for key, tracker in list(self._open.items()):
            with self._guarded(key):
                tracker.close(verdict)
        self._open = {}

    @contextmanager
    def _guarded(self, key: str) -> Iterator[None]:
        # A tracker that draws from a global generator, on rank 0 only, would make this run diverge.
        state = get_rng_state()
        try:
            yield
        except Exception as error:  # for example a server that does not respond, which must not end the run
            self._open.pop(key, None)
            log.warning("report.%s: disabled after an error: %s", key, describe_exception(error))
        finally:
            set_rng_state(state)


def check_trackers(config: ReportConfig) -> None:
    """Check that the packages of the enabled trackers are installed.

    Raises:
        UsageError: A package is missing.
    """
    for key in ("tensorboard", "wandb"):
        if getattr(config, key) and find_spec(key) is None:
            raise UsageError(
                f"report.{key}: the package {key} is not installed. "
                f"Install it with pip install {key}, or set --report.{key} false.",
                code="package-missing",
                key=f"report.{key}",
                package=key,
            )


def _scalars(done: EpochDone) -> dict[str, float]:
    """Return one value per metric and replica, named like `train/loss/replica_0`."""
    columns = {f"train/{key}": values for key, values in done.train.items()}
    columns |= {f"val/{key}": values for key, values in done.val.items()}
    columns["images_per_second"] = done.throughput
    for group in range(max(map(len, done.lr), default=0)):
        name = "lr" if group == 0 else f"lr_{group + 1}"
        columns[name] = [rates[group] if group < len(rates) else math.nan for rates in done.lr]
    return {
        f"{name}/replica_{replica_id}": value for name, row in columns.items() for replica_id, value in enumerate(row)
    }


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, verdict: Verdict | None) -> None:
        lines = [] if verdict is None else [verdict.summary, *map(str, verdict.evidence), *map(str, verdict.remedy)]
        # Indented as code, so that nothing in it is rendered as markup.
        self._writer.add_text("verdict", "\n".join(f"    {line}" for line in lines))
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, name: str, run_config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dreplica"),
            name=folder.name,
            group=name,
            dir=str(folder),
            config=dict(run_config),
            settings=wandb.Settings(silent=True),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, verdict: Verdict | None) -> None:
        for key in ("cause", "summary", "step", "stage", "tensor", "operator", "suspects"):
            self._run.summary[f"verdict/{key}"] = getattr(verdict, key, None)
        self._run.finish(exit_code=0 if verdict is not None and verdict.cause == "none" else 1)
