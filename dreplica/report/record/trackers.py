"""Where else results may go, epoch by epoch: TensorBoard, Weights & Biases. From rank 0 alone."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dreplica.agreement.trace.run_report import RunReport
from dreplica.config.schema import ReportConfig
from dreplica.distributed.failure import describe_exception
from dreplica.errors import UsageError
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.training.events import EpochDone

log = logging.getLogger(__name__)


class _Sink(Protocol):
    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, verdict: Mapping[str, Any]) -> None: ...


class Sinks:
    """Those that the config asks for. One that fails is warned of and left; no random number generator is moved."""

    def __init__(self, config: ReportConfig, folder: Path, name: str, run_config: Mapping[str, Any]) -> None:
        openers: dict[str, Callable[[], _Sink]] = {}
        if config.tensorboard:
            openers["tensorboard"] = lambda: _TensorBoard(folder)
        if config.wandb:
            openers["wandb"] = lambda: _WeightsAndBiases(folder, name, run_config)
        self._open: dict[str, _Sink] = {}
        for key, opener in openers.items():
            with self._guarded(key):
                self._open[key] = opener()

    def epoch(self, done: EpochDone) -> None:
        """An epoch's results."""
        values = _scalars(done)
        for key, sink in list(self._open.items()):
            with self._guarded(key):
                sink.scalars(values, done.step)

    def close(self, report: RunReport) -> None:
        """The verdict, and the end."""
        for key, sink in list(self._open.items()):
            with self._guarded(key):
                sink.close({} if report.verdict is None else report.verdict.as_dict())
        self._open = {}

    @contextmanager
    def _guarded(self, key: str) -> Iterator[None]:
        # A draw from a global generator, on rank 0 alone, would be a divergence of this very run.
        state = get_rng_state()
        try:
            yield
        except Exception as error:  # a server that does not answer, say: the run is not to end for that
            self._open.pop(key, None)
            log.warning("report.%s: not written to any more: %s", key, describe_exception(error))
        finally:
            set_rng_state(state)


def check_sinks(config: ReportConfig) -> None:
    """Raises UsageError if a package that the config asks for is not installed."""
    for key in ("tensorboard", "wandb"):
        if getattr(config, key) and find_spec(key) is None:
            raise UsageError(
                f"report.{key}: true will not do: the package {key} is not installed. Install it with "
                f"pip install {key}, or set report.{key} to false."
            )


def _scalars(done: EpochDone) -> dict[str, float]:
    """One value per replica, as `train/loss/replica_0`."""
    columns = {f"train/{key}": values for key, values in done.train.items()}
    columns |= {f"val/{key}": values for key, values in done.val.items()}
    columns["images_per_second"] = done.throughput
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

    def close(self, verdict: Mapping[str, Any]) -> None:
        lines = [str(verdict.get("summary")), *verdict.get("evidence", []), *verdict.get("remedy", [])]
        # As code, lest anything in it is taken for markup.
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

    def close(self, verdict: Mapping[str, Any]) -> None:
        for key in ("cause", "summary", "step", "stage", "tensor", "operator", "suspects"):
            self._run.summary[f"verdict/{key}"] = verdict.get(key)
        self._run.finish(exit_code=0 if verdict.get("cause") == "none" else 1)
