"""Explanations of operators that may give different results for the same inputs, with the settings that govern them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.diagnosis.decision.documented_ops import DOCUMENTED, UNVERIFIED, Documented

_CUDNN_WORKSPACES = (":16:8", ":4096:2")
_CUBLAS_WORKSPACES = (":4096:8", ":16:8")

_ONEDNN = {
    *("convolution", "convolution_backward", "_convolution", "mkldnn_convolution"),
    *("mkldnn_linear", "mkldnn_linear_backward", "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"),
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv"),
}
"""Operators that PyTorch may hand to oneDNN on the CPU, of those that a traced step holds."""


@dataclass(frozen=True)
class Explanation:
    """The reason why an operator may give different results for the same inputs."""

    status: Literal["documented", "unverified", "undocumented"]
    """What is known: PyTorch documents it as nondeterministic on this device, it is assumed without documentation, or
    nothing is known."""
    text: str
    """The explanation in one or two sentences."""
    remedy: list[Remedy]
    """Settings to change and other things to do."""

    @property
    def known(self) -> bool:
        """True if the operator is documented as nondeterministic on this device."""
        return self.status == "documented"


def explain_operator(operator: str, device_type: str, flags: Mapping[str, Any]) -> Explanation:
    """Explain why an operator may give different results for the same inputs on one replica.

    Args:
        operator: Its name in a trace, as in `aten.index_add_.default`.
        device_type: The device that it ran on: `cuda` or `cpu`.
        flags: The replica's settings, with the keys of `numerics_flags()`. A missing one counts as unknown.

    Returns:
        What is documented of the operator, which settings govern it, and what is left to change.
    """
    documented = DOCUMENTED.get(operator) or DOCUMENTED.get(operator.rpartition(".")[0])
    on = {"cuda": "CUDA", "cpu": "the CPU"}.get(device_type, device_type)
    if documented is not None and device_type in documented.devices:
        text, remedy = _settings(documented, flags)
        return Explanation("documented", f"{operator} on {on} {documented.why}; {text}.", remedy)
    assumed = UNVERIFIED.get(operator) or UNVERIFIED.get(operator.rpartition(".")[0])
    if assumed is not None and device_type in assumed.devices:
        return _unverified(operator, assumed, on, flags)
    if not operator.startswith("aten."):
        return _custom(operator, device_type)
    if _draws(operator):
        text = (
            f"{operator} draws random numbers, the same ones from the same state of its generator, which a trace "
            "counts among its inputs. PyTorch documents nothing else about it."
        )
        return Explanation("undocumented", text, [Remedy.of("use-global-generator"), *_suspect_device(device_type)])
    elsewhere = ""
    if documented is not None:
        elsewhere = f" (it is on {' and '.join(name.upper() for name in documented.devices)})"
    text = f"{operator} is not among the operators that PyTorch documents as nondeterministic on {on}{elsewhere}"
    remedy = [] if _is_strict(flags) else [Remedy.of("strict-mode")]
    if device_type == "cpu" and operator.split(".")[1] in _ONEDNN and flags.get("onednn"):
        text += "; oneDNN may have computed it, with kernels that are not PyTorch's own"
        remedy.append(Remedy.of("disable-onednn"))
    if device_type == "cpu" and flags.get("threads") != 1:
        text += f"; it ran on {flags.get('threads', 'an unknown number of')} threads"
        remedy.append(Remedy.of("one-thread"))
    return Explanation("undocumented", f"{text}.", remedy + _suspect_device(device_type))


def may_vary(operator: str, device_type: str, flags: Mapping[str, Any]) -> bool:
    """Return True if an operator is documented, or assumed, to vary from run to run with these settings.

    Args:
        operator: Its name in a trace, as in `aten.index_add_.default`.
        device_type: The device that it ran on: `cuda` or `cpu`.
        flags: The replica's settings, with the keys of `numerics_flags()`.
    """
    explanation = explain_operator(operator, device_type, flags)
    if explanation.status == "unverified":
        return True
    return explanation.known and any(remedy.settings for remedy in explanation.remedy)


def is_picked_by_timing(operator: str, flags: Mapping[str, Any]) -> bool:
    """Return True if each process keeps the cuDNN algorithm that it measured as the fastest for an input's shape."""
    documented = DOCUMENTED.get(operator.rpartition(".")[0])
    return documented is not None and documented.governs == "cudnn" and bool(flags.get("cudnn_benchmark"))


def _unverified(operator: str, assumed: Documented, on: str, flags: Mapping[str, Any]) -> Explanation:
    text = (
        f"{operator} on {on} {assumed.why}. This is unverified: PyTorch does not document the operator as "
        "nondeterministic, and no setting is known to govern it."
    )
    remedy = [Remedy.of("use-instead", instead=assumed.instead)] if assumed.instead else []
    remedy += [] if _is_strict(flags) else [Remedy.of("strict-mode-stops")]
    return Explanation("unverified", text, [*remedy, Remedy.of("report-to-pytorch")])


def _settings(documented: Documented, flags: Mapping[str, Any]) -> tuple[str, list[Remedy]]:
    """Describe the settings that govern an operator, and what is left to change."""
    if documented.governs == "cudnn":
        return _cudnn(flags)
    if documented.governs in {"cublas", "rnn"}:
        workspaces = _CUDNN_WORKSPACES if documented.governs == "rnn" else _CUBLAS_WORKSPACES
        return _cublas(workspaces, flags)
    if documented.governs == "bmm":
        text, remedy = _cublas(_CUBLAS_WORKSPACES, flags)
        if flags.get("deterministic_algorithms"):
            return text, remedy
        dense = [item for item in remedy if item.code != "report-to-pytorch"] or [Remedy.of("strict-mode")]
        values = _values(("deterministic_algorithms",), flags)
        return f"{text} for dense matrices; {values}, which decides for sparse ones", dense
    values = _values(("deterministic_algorithms", "deterministic_warn_only"), flags)
    strict = [Remedy.of("strict-mode")]
    instead = [Remedy.of("use-instead", instead=documented.instead)] if documented.instead else []
    enabled, warned = flags.get("deterministic_algorithms"), flags.get("deterministic_warn_only")
    if documented.governs in {"switches", "switches-if-strict"}:
        if not enabled or (documented.governs == "switches-if-strict" and warned):
            return f"{values}, so no deterministic algorithm was requested", strict
        return f"{values}, which should make it deterministic", [Remedy.of("report-to-pytorch")]
    if documented.governs == "switches-or-raises":
        if not _is_strict(flags):
            return values, strict + instead
        text = f"{values}, which should make it deterministic or stop the run"
        return text, [Remedy.of("report-to-pytorch"), *instead]
    if _is_strict(flags):
        return f"no setting makes it deterministic, and with {values} it should have raised an error", instead
    return f"no setting makes it deterministic; {values}", [*instead, Remedy.of("strict-mode-stops")]


def _cudnn(flags: Mapping[str, Any]) -> tuple[str, list[Remedy]]:
    values = _values(("cudnn_deterministic", "deterministic_algorithms", "cudnn_benchmark"), flags)
    remedy = []
    if not (flags.get("cudnn_deterministic") or flags.get("deterministic_algorithms")):
        remedy.append(Remedy.of("cudnn-deterministic"))
    if flags.get("cudnn_benchmark") is not False:
        remedy.append(Remedy.of("cudnn-benchmark"))
    if remedy:
        return values, remedy + _tf32(flags, "cudnn_tf32")
    return f"{values}, which should make it deterministic", [Remedy.of("report-to-pytorch")]


def _cublas(workspaces: tuple[str, ...], flags: Mapping[str, Any]) -> tuple[str, list[Remedy]]:
    present = flags.get("cublas_workspace_config")
    value = f"on this replica CUBLAS_WORKSPACE_CONFIG was {present or 'not set'}"
    if present in workspaces:
        return f"{value}, which should make it deterministic", [Remedy.of("report-to-pytorch")]
    # Only :16:8 is in both lists, so it never undoes what the other operators need.
    wanted = ":16:8" if ":4096:8" not in workspaces else ":4096:8"
    settings = {} if flags.get("deterministic_algorithms") else {"determinism.mode": "strict"}
    settings["determinism.cublas_workspace_config"] = wanted
    remedy = [Remedy.of("cublas-workspace", settings=settings)]
    if present is not None:
        remedy.insert(0, Remedy.of("unset-cublas-workspace"))
    return f"{value}, not one of {', '.join(workspaces)}", remedy + _tf32(flags, "matmul_tf32")


def _tf32(flags: Mapping[str, Any], flag: str) -> list[Remedy]:
    # TF32 rounds the same way each time on one model of GPU, so it is not nondeterministic in itself.
    return [Remedy.of("disable-tf32")] if flags.get(flag) else []


def _values(names: Iterable[str], flags: Mapping[str, Any]) -> str:
    values = [f"{name} was {flags[name]}" for name in names if name in flags]
    return f"on this replica {', '.join(values)}" if values else "this replica's settings are unknown"


def _is_strict(flags: Mapping[str, Any]) -> bool:
    return bool(flags.get("deterministic_algorithms")) and flags.get("deterministic_warn_only") is False


def _suspect_device(device_type: str) -> list[Remedy]:
    return [Remedy.of("test-other-gpu" if device_type == "cuda" else "test-other-host")]


def _custom(operator: str, device_type: str) -> Explanation:
    namespace = operator.partition(".")[0]
    text = (
        f"{operator} is not one of PyTorch's operators: the code that registers {namespace!r} decides what it does, "
        "and torch's settings may not affect it."
    )
    remedy = [Remedy.of("inspect-custom-operator")]
    if device_type == "cuda":
        remedy.append(Remedy.of("sanitize-custom-operator"))
    return Explanation("undocumented", text, [*remedy, Remedy.of("replace-custom-operator", namespace=namespace)])


def _draws(operator: str) -> bool:
    """Return True if torch declares that the operator draws from a generator."""
    _, name, overload = operator.split(".")
    packet = getattr(torch.ops.aten, name, None)
    function = getattr(packet, overload, None)
    return function is not None and torch.Tag.nondeterministic_seeded in function.tags
