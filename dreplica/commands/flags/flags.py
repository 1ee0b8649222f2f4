"""The flags that strict mode sets for reproducibility, and the settings that only trade precision for speed.

Sources: the documentation of `torch.use_deterministic_algorithms`, `torch.utils.deterministic`
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
    """A flag that can be disabled."""

    name: str
    """Key in the section `determinism`."""
    sets: str
    """The setting in torch that strict mode makes."""
    devices: tuple[str, ...]
    """Device types on which the flag has an effect."""
    within: str | None = None
    """The flag without which this one has no effect."""


@dataclass(frozen=True)
class Option:
    """A setting that changes how numbers are rounded, the same way each time."""

    name: str
    """Key in the section `determinism`."""
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
    """One setting of the flags of a job."""

    disabled: frozenset[str] = frozenset()
    """Flags that are disabled. Empty in strict mode."""
    option: tuple[str, Any] | None = None
    """A key of `determinism` with another value than the job's own."""

    @property
    def name(self) -> str:
        """Name in words."""
        if self.option is not None:
            return f"strict, {self.option[0]} {_yaml(self.option[1])}"
        return f"without {', '.join(ordered(self.disabled))}" if self.disabled else "strict"

    def section(self, own: DeterminismConfig) -> DeterminismConfig:
        """Return the section `determinism` for this setting. Threads, precision and oneDNN are taken from `own`."""
        update = settings_without(self.disabled) | dict([self.option] if self.option is not None else [])
        return own.model_copy(update=update)

    @property
    def variables(self) -> dict[str, str | None]:
        """Environment variables to set, since mode `off` does not. None removes a variable."""
        return {_WORKSPACE: None if "cublas_workspace_config" in self.disabled else _workspace()}

    @property
    def process(self) -> tuple[bool, bool]:
        """Key that is equal for settings that can follow each other in one process without affecting each other.

        cuBLAS reads its variable once. cuDNN keeps the algorithm that it has picked for a convolution, by timing or
        not, even if `torch.backends.cudnn.benchmark` changes later (aten/src/ATen/native/cudnn/Conv_v8.cpp).
        """
        return "cublas_workspace_config" in self.disabled, "cudnn_benchmark" in self.disabled

    @property
    def unusable(self) -> str | None:
        """Reason why the preflight of strict mode rejects this setting on a GPU, or None."""
        if "cublas_workspace_config" in self.disabled and "mode" not in self.disabled:
            return f"strict mode does not start without {_WORKSPACE}, since cuBLAS operators would raise"
        return None


STRICT = Variant()


def with_effect_on(device_type: str) -> list[Flag]:
    """Return the flags that have an effect on this device type (`cpu`, `cuda`)."""
    return [flag for flag in FLAGS if device_type in flag.devices]


def without_effect_on(device_type: str) -> list[str]:
    """Return the names of flags and options without an effect on this device type."""
    return [item.name for item in (*FLAGS, *OPTIONS) if device_type not in item.devices]


def closed(disabled: Iterable[str]) -> frozenset[str]:
    """Return these flags and those that have no effect without one of them."""
    names = frozenset(disabled)
    return names | {flag.name for flag in FLAGS if flag.within in names}


def ordered(names: Iterable[str]) -> list[str]:
    """Return the names in the order of `FLAGS`."""
    wanted = set(names)
    return [flag.name for flag in FLAGS if flag.name in wanted]


def settings_without(disabled: frozenset[str]) -> dict[str, Any]:
    """Return the keys of `determinism` for strict mode without some of its flags."""
    return {
        "mode": "off" if "mode" in disabled else "strict",
        "fill_uninitialized_memory": "fill_uninitialized_memory" not in disabled,
        "cudnn_deterministic": "cudnn_deterministic" not in disabled,
        "cudnn_benchmark": "cudnn_benchmark" in disabled,
        "cublas_workspace_config": None if "cublas_workspace_config" in disabled else _workspace(),
    }


def options_on(device_type: str, own: DeterminismConfig, cpus_per_replica: int) -> tuple[list[Variant], list[str]]:
    """Return the options to measure on this device.

    Args:
        device_type: `cpu` or `cuda`.
        own: The `determinism` section of the job. Each option changes one of its values.
        cpus_per_replica: Number of threads to try.

    Returns:
        The settings to measure, and the reason for each option that is not measured.
    """
    variants, left_out = [], []
    for option in OPTIONS:
        value = cpus_per_replica if option.name == "threads" else not getattr(own, option.name)
        if device_type not in option.devices:
            continue
        if option.name == "threads" and own.threads >= cpus_per_replica:
            left_out.append(f"threads: {own.threads} per replica already uses all CPUs")
        else:
            variants.append(Variant(option=(option.name, value)))
    return variants, left_out


def to_paste(disabled: frozenset[str], device_type: str) -> tuple[Mapping[str, Any], list[str]]:
    """Return the section `determinism` to paste, and lines for the shell that starts the job."""
    present = {flag.name for flag in with_effect_on(device_type)}
    keys = {key: value for key, value in settings_without(disabled).items() if key in present}
    if "mode" in disabled and keys.get("cublas_workspace_config") is not None:
        del keys["cublas_workspace_config"]  # without effect: it is exported instead
    lines = []
    if "cublas_workspace_config" in present:
        if "cublas_workspace_config" in disabled and _WORKSPACE in os.environ:
            lines.append(f"unset {_WORKSPACE}")
        if "cublas_workspace_config" not in disabled and "mode" in disabled:
            lines.append(f"export {_WORKSPACE}={_workspace()}  # mode off leaves it to the environment")
        elif "cublas_workspace_config" not in disabled and os.environ.get(_WORKSPACE) not in {None, _workspace()}:
            lines.append(f"unset {_WORKSPACE}  # cuBLAS is not deterministic with {os.environ[_WORKSPACE]}")
    return keys, lines


def _workspace() -> str:
    """Return the workspace that the user set, if cuBLAS is deterministic with it, or the usual one."""
    present = os.environ.get(_WORKSPACE)
    return present if present in DETERMINISTIC_WORKSPACES else _USUAL_WORKSPACE


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
