"""Operators that PyTorch documents as nondeterministic, and the settings that govern them.

Sources: the documentation of `torch.use_deterministic_algorithms` (2.11 to 2.15; where releases differ, the entry says
so), PyTorch's notes on reproducibility (https://docs.pytorch.org/docs/stable/notes/randomness.html), the warnings in
the documentation of `torch.nn.LSTM`, `torch.kthvalue`, `index_reduce_` and scaled dot product attention, and NVIDIA's
on cuBLAS (https://docs.nvidia.com/cuda/cublas/#results-reproducibility). The documentation names Python functions; the
tables here name the operators that those dispatch to, as a trace names them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dreplica.agreement.verdict.remedy import Remedy

Governs = Literal["switches", "switches-if-strict", "raises", "switches-or-raises", "cudnn", "cublas", "bmm", "rnn"]
"""The setting that makes an operator deterministic.

- `switches`: the modes strict and warn choose another algorithm.
- `switches-if-strict`: only the mode strict chooses another algorithm.
- `raises`: no setting does, and the mode strict raises an error.
- `switches-or-raises`: one of these, depending on the release or on the arguments.
- `cudnn`: the flags `cudnn_deterministic` and `cudnn_benchmark`.
- `cublas`: the cuBLAS workspace.
- `bmm`: the cuBLAS workspace for dense matrices, the mode for sparse ones.
- `rnn`: the cuBLAS workspace, with the values that the documentation of cuDNN's recurrent layers names.
"""

_ATOMICS = "adds with atomics, in the order in which its threads arrive"
_LAST_WRITER = "leaves it to chance which of several writes to one place is the last"
_CUDNN_WORKSPACES = (":16:8", ":4096:2")
_CUBLAS_WORKSPACES = (":4096:8", ":16:8")


@dataclass(frozen=True)
class Documented:
    """The documentation of one nondeterministic operator."""

    governs: Governs
    why: str
    """A predicate that describes the nondeterministic behavior, such as "adds with atomics"."""
    devices: tuple[str, ...] = ("cuda",)
    instead: str = ""
    """A replacement for an operator that no setting makes deterministic."""


@dataclass(frozen=True)
class Explanation:
    """The reason why an operator may give different results for the same inputs."""

    known: bool
    """True if the operator is documented as nondeterministic on this device."""
    text: str
    """The explanation in one or two sentences."""
    remedy: list[Remedy]
    """Settings to change and other things to do."""


def _table() -> dict[str, Documented]:
    entries: dict[str, Documented] = {}

    def add(names: str, documented: Documented) -> None:
        entries.update({f"aten.{name}": documented for name in names.split()})

    def raises(names: str, instead: str, why: str = _ATOMICS, devices: tuple[str, ...] = ("cuda",)) -> None:
        add(names, Documented("raises", why, devices, instead))

    both = ("cuda", "cpu")
    add(
        "index_add index_add_ scatter_add scatter_add_ embedding_dense_backward",
        Documented("switches", _ATOMICS),
    )
    add(
        "replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward",
        Documented("switches", _ATOMICS),
    )
    add("cumsum cumsum_", Documented("switches", "adds up partial sums that depend on how its blocks are scheduled"))
    add("scatter.src scatter_.src", Documented("switches", _LAST_WRITER))
    add("index_copy index_copy_", Documented("switches", _LAST_WRITER, both))
    why = f"{_LAST_WRITER}, and on the CPU, where it accumulates, {_ATOMICS}"
    add("index_put index_put_ _index_put_impl_ _unsafe_index_put", Documented("switches", why, both))
    why = f"{_ATOMICS} (strict mode makes the reductions sum and mean deterministic and raises on others)"
    add("scatter_reduce scatter_reduce_", Documented("switches-or-raises", why))
    pool3d = f"{_ATOMICS} (older releases raise in strict mode, newer ones choose another algorithm)"
    add("max_pool3d_with_indices_backward", Documented("switches-or-raises", pool3d))
    interpolate = f"{_ATOMICS} (F.interpolate avoids it in strict and warn mode, for bicubic in newer releases only)"
    add(
        "upsample_bilinear2d_backward upsample_trilinear3d_backward upsample_bicubic2d_backward",
        Documented("switches-or-raises", interpolate, instead="F.interpolate with mode='nearest'"),
    )

    raises(
        "upsample_linear1d_backward",
        "F.interpolate(x[:, :, None], (1, size), mode='bilinear')[:, :, 0], in strict mode",
    )
    raises("_upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward", "F.interpolate without antialias=True")
    raises("avg_pool3d_backward", "a convolution with equal, fixed weights")
    raises("_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward", "x.mean((-2, -1)) for one output, or AvgPool")
    raises("adaptive_max_pool2d_backward adaptive_max_pool3d_backward", "x.amax((-2, -1)) for one output, or MaxPool2d")
    raises("fractional_max_pool2d_backward fractional_max_pool3d_backward", "MaxPool2d")
    raises("max_unpool2d max_unpool3d", "F.interpolate with mode='nearest'", _LAST_WRITER, both)
    raises("reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward", "padding_mode='replicate'")
    raises("nll_loss2d_forward nll_loss2d_backward", "the loss over logits reshaped from (N, C, H, W) to (N*H*W, C)")
    raises("_ctc_loss_backward", "F.ctc_loss on the CPU")
    raises(
        "_embedding_bag_backward _embedding_bag_dense_backward", "mode='sum' or mode='mean' (only 'max' is at fault)"
    )
    why = f"{_LAST_WRITER}, or where it accumulates {_ATOMICS} (which strict mode prevents on the CPU only)"
    add("put put_", Documented("switches-or-raises", why, both, "index_put_"))
    raises("histc", "torch.histc on the CPU, or on integers")
    raises("bincount", "torch.bincount without weights, or on the CPU")
    why = "may return the index of any of several equal elements (the value alone is deterministic)"
    raises("median.dim nanmedian.dim", "torch.sort, and the middle element", why)
    kth = f"{why} (older releases raise in strict mode)"
    add("kthvalue", Documented("switches-or-raises", kth, instead="torch.sort, and the k-th element"))
    raises("index_reduce index_reduce_", "scatter_reduce with sum or mean, in strict mode")
    raises("grid_sampler_2d_backward grid_sampler_3d_backward", "F.grid_sample on the CPU")

    attention = "splits the sum over keys between blocks, which add with atomics"
    add(
        "_scaled_dot_product_flash_attention_backward _flash_attention_backward "
        "_scaled_dot_product_efficient_attention_backward _efficient_attention_backward "
        "_scaled_dot_product_cudnn_attention_backward",
        Documented("switches-if-strict", attention),
    )
    add(
        "convolution convolution_backward cudnn_convolution cudnn_convolution_transpose _convolution",
        Documented("cudnn", "is given to whichever of cuDNN's algorithms is chosen, not all of them deterministic"),
    )
    why = "lets cuBLAS choose its algorithm by the workspace at hand, which several streams may share"
    products = "mm addmm addmm_ _addmm_activation _scaled_mm baddbmm baddbmm_ addbmm mv addmv addmv_ dot"
    add(products, Documented("cublas", why))
    add("bmm", Documented("bmm", f"{why}, and for a sparse matrix {_ATOMICS}"))
    why = "runs in cuDNN's recurrent layers, not deterministic in some versions of cuDNN and CUDA"
    add("_cudnn_rnn _cudnn_rnn_backward", Documented("rnn", why))
    return entries


_ONEDNN = {
    *("convolution", "convolution_backward", "_convolution", "mkldnn_convolution"),
    *("mkldnn_linear", "mkldnn_linear_backward", "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"),
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv"),
}
"""Operators that PyTorch may hand to oneDNN on the CPU, of those that a traced step holds."""

DOCUMENTED: Mapping[str, Documented] = _table()
"""Operator (`aten.index_add_`, or with its overload if only that one) to what is documented of it."""


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
        return Explanation(True, f"{operator} on {on} {documented.why}; {text}.", remedy)
    if not operator.startswith("aten."):
        return _custom(operator, device_type)
    if _draws(operator):
        text = (
            f"{operator} draws random numbers, the same ones from the same state of its generator, which a trace "
            "counts among its inputs. PyTorch documents nothing else about it."
        )
        return Explanation(False, text, [Remedy.of("use-global-generator"), *_suspect_device(device_type)])
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
    return Explanation(False, f"{text}.", remedy + _suspect_device(device_type))


def may_vary(operator: str, device_type: str, flags: Mapping[str, Any]) -> bool:
    """Return True if an operator is documented to vary from run to run with these settings.

    Args:
        operator: Its name in a trace, as in `aten.index_add_.default`.
        device_type: The device that it ran on: `cuda` or `cpu`.
        flags: The replica's settings, with the keys of `numerics_flags()`.
    """
    explanation = explain_operator(operator, device_type, flags)
    return explanation.known and any(remedy.settings for remedy in explanation.remedy)


def is_picked_by_timing(operator: str, flags: Mapping[str, Any]) -> bool:
    """Return True if each process keeps the cuDNN algorithm that it measured as the fastest for an input's shape."""
    documented = DOCUMENTED.get(operator.rpartition(".")[0])
    return documented is not None and documented.governs == "cudnn" and bool(flags.get("cudnn_benchmark"))


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
    return Explanation(False, text, [*remedy, Remedy.of("replace-custom-operator", namespace=namespace)])


def _draws(operator: str) -> bool:
    """Return True if torch declares that the operator draws from a generator."""
    _, name, overload = operator.split(".")
    packet = getattr(torch.ops.aten, name, None)
    function = getattr(packet, overload, None)
    return function is not None and torch.Tag.nondeterministic_seeded in function.tags
