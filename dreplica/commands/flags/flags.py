"""The flags that strict mode sets for the sake of reproducibility, and the settings that only trade numbers for speed.

What governs what: the documentation of `torch.use_deterministic_algorithms`, `torch.utils.deterministic`
(https://docs.pytorch.org/docs/stable/deterministic.html) and PyTorch's notes on reproducibility
(https://docs.pytorch.org/docs/stable/notes/randomness.html).
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dreplica.config.schema import DeterminismConfig
from dreplica.environment.determinism import DETERMINISTIC_WORKSPACES

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_USUAL_WORKSPACE = ":4096:8"


@dataclass(frozen=True)
class Flag:
    """One that can be given up; `name`: its key in the section `determinism`."""

    name: str
    sets: str
    """What it is in torch, as strict mode has it."""
    devices: tuple[str, ...]
    """Where it has an effect."""
    within: str | None = None
    """The flag without which it has none."""


@dataclass(frozen=True)
class Option:
    """A setting that changes how numbers are rounded, the same way each time; `name`: its key in `determinism`."""

    name: str
    devices: tuple[str, ...]


_BOTH, _CUDA, _CPU = ("cpu", "cuda"), ("cuda",), ("cpu",)

FLAGS = (
    Flag("mode", "torch.use_deterministic_algorithms(True)", _BOTH),
    Flag("fill_uninitialized_memory", "torch.utils.deterministic.fill_uninitialized_memory = True", _BOTH, "mode"),
    Flag("cudnn_deterministic", "torch.backends.cudnn.deterministic = True", _CUDA),
    Flag("cudnn_benchmark", "torch.backends.cudnn.benchmark = False", _CUDA),
    Flag("cublas_workspace_config", f"{_WORKSPACE}={_USUAL_WORKSPACE}", _CUDA),
)

OPTIONS = (
    Option("tf32", _CUDA),
    Option("reduced_precision_reduction", _CUDA),
    Option("threads", _CPU),
    Option("onednn", _CPU),
)


@dataclass(frozen=True)
class Variant:
    """The job in one setting of its flags."""

    given_up: frozenset[str] = frozenset()
    """Flags; none: strict mode."""
    option: tuple[str, Any] | None = None
    """A key of `determinism` and a value other than the job's own."""

    @property
    def name(self) -> str:
        """In words."""
        if self.option is not None:
            return f"strict, {self.option[0]} {_yaml(self.option[1])}"
        return f"without {', '.join(ordered(self.given_up))}" if self.given_up else "strict"

    def section(self, own: DeterminismConfig) -> DeterminismConfig:
        """The section `determinism` of a job whose own is `own`: from that come threads, precision and oneDNN."""
        update = settings_without(self.given_up) | dict([self.option] if self.option is not None else [])
        return own.model_copy(update=update)

    @property
    def variables(self) -> dict[str, str | None]:
        """Of the environment, which mode `off` leaves as it is; None: not set."""
        return {_WORKSPACE: None if "cublas_workspace_config" in self.given_up else _workspace()}

    @property
    def process(self) -> tuple[bool, bool]:
        """The same of two settings that may follow each other in one process, each as if it were alone.

        cuBLAS reads its variable once. What cuDNN has picked for a convolution, by timing or without, is kept for the
        next one like it, whatever `torch.backends.cudnn.benchmark` is by then (aten/src/ATen/native/cudnn/Conv_v8.cpp).
        """
        return "cublas_workspace_config" in self.given_up, "cudnn_benchmark" in self.given_up

    @property
    def unusable(self) -> str | None:
        """Why a job in this setting does not even start on a GPU, strict mode's preflight being what it is; or None."""
        if "cublas_workspace_config" in self.given_up and "mode" not in self.given_up:
            return f"strict mode does not start without {_WORKSPACE}, since operators of cuBLAS would raise"
        return None


STRICT = Variant()


def with_effect_on(device_type: str) -> list[Flag]:
    """Those flags that a job on this device (`cpu`, `cuda`) can tell from their absence."""
    return [flag for flag in FLAGS if device_type in flag.devices]


def without_effect_on(device_type: str) -> list[str]:
    """The names of all others, of options, too."""
    return [item.name for item in (*FLAGS, *OPTIONS) if device_type not in item.devices]


def closed(given_up: Iterable[str]) -> frozenset[str]:
    """With those flags that have no effect without one that is given up."""
    names = frozenset(given_up)
    return names | {flag.name for flag in FLAGS if flag.within in names}


def ordered(names: Iterable[str]) -> list[str]:
    """In the order of `FLAGS`."""
    wanted = set(names)
    return [flag.name for flag in FLAGS if flag.name in wanted]


def settings_without(given_up: frozenset[str]) -> dict[str, Any]:
    """Strict mode's keys of `determinism`, without some of its flags."""
    return {
        "mode": "off" if "mode" in given_up else "strict",
        "fill_uninitialized_memory": "fill_uninitialized_memory" not in given_up,
        "cudnn_deterministic": "cudnn_deterministic" not in given_up,
        "cudnn_benchmark": "cudnn_benchmark" in given_up,
        "cublas_workspace_config": None if "cublas_workspace_config" in given_up else _workspace(),
    }


def options_on(device_type: str, own: DeterminismConfig, cpus_per_replica: int) -> tuple[list[Variant], list[str]]:
    """What else is worth measuring on this device; and of what would have an effect there and is not, why.

    `own`: the job's section, whose value each variant changes; `cpus_per_replica`: how many threads fit.
    """
    variants, left_out = [], []
    for option in OPTIONS:
        value = cpus_per_replica if option.name == "threads" else not getattr(own, option.name)
        if device_type not in option.devices:
            continue
        if option.name == "threads" and own.threads >= cpus_per_replica:
            left_out.append(f"threads: {own.threads} for each replica is as many as there are CPUs for")
        else:
            variants.append(Variant(option=(option.name, value)))
    return variants, left_out


def to_paste(given_up: frozenset[str], device_type: str) -> tuple[Mapping[str, Any], list[str]]:
    """Keys of the section `determinism` with their values, and lines for the shell that starts the job."""
    present = {flag.name for flag in with_effect_on(device_type)}
    keys = {key: value for key, value in settings_without(given_up).items() if key in present}
    lines = []
    if "cublas_workspace_config" in present:
        if "cublas_workspace_config" in given_up and _WORKSPACE in os.environ:
            lines.append(f"unset {_WORKSPACE}")
        if "cublas_workspace_config" not in given_up and "mode" in given_up:
            lines.append(f"export {_WORKSPACE}={_workspace()}  # mode off leaves it to the environment")
        elif "cublas_workspace_config" not in given_up and os.environ.get(_WORKSPACE) not in {None, _workspace()}:
            lines.append(f"unset {_WORKSPACE}  # cuBLAS is not deterministic with {os.environ[_WORKSPACE]}")
    return keys, lines


def _workspace() -> str:
    """The user's own, if cuBLAS is deterministic with it."""
    present = os.environ.get(_WORKSPACE)
    return present if present in DETERMINISTIC_WORKSPACES else _USUAL_WORKSPACE


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
