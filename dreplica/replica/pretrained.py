"""Pretrained weights: everything except the head, from torchvision by name or from a file."""

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dreplica.distributed.process_group import env_rank
from dreplica.errors import UsageError
from dreplica.replica.published import WEIGHTS_SUFFIXES, check_hash, fetch, is_file

log = logging.getLogger(__name__)

_NESTS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts usually save a model's state_dict."""
_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to every name."""
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Prefixes of the training-only heads in torchvision's files, which torchvision also drops."""
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)")
"""Names in torchvision's DenseNet files, saved when a module's name could contain a dot: norm.1 is norm1 today."""


def load_pretrained(model: nn.Module, weights: str, published: Any | None, num_classes: int) -> str | None:
    """Load `weights` into `model` in place, except into its head.

    The head is the last linear or convolutional layer with `num_classes` outputs. No random numbers are drawn. Weights
    given by name must fit completely. From a file, the tensors that fit are loaded and the others are logged.

    Args:
        model: The model, on the CPU.
        weights: `model.weights` of the config: a name of torchvision's or a path.
        published: The member of torchvision's WeightsEnum that `weights` names, None for any other file.
        num_classes: Number of outputs of the head.

    Returns:
        The head's module name, None if there is none.

    Raises:
        UsageError: If the file is missing, unreadable, holds more than tensors, or none of its tensors fits.
    """
    if is_file(weights):
        path = Path(weights).expanduser()
        remedy = f"Copy it again, or name another file. Relative paths start at {Path.cwd()}."
    else:
        path, remedy = fetch(published), "Delete it to download it again, or replace it with a complete file."
    if published is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        check_hash(path, published)
    tensors = _unwrap(read_weights(path, remedy), path, model)
    head = find_head(model, num_classes)
    # Weights without categories (VGG16's IMAGENET1K_FEATURES) are incomplete by torchvision's own account.
    complete = not is_file(weights) and bool(published and published.meta["categories"])
    try:
        fit = _load(model, tensors, head)
    except (RuntimeError, ValueError) as error:  # a module's own hook, or a conversion: shapes alone do not predict it
        raise _weights_error(
            f"{str(path)!r} does not load into this model: {error}", "weights-do-not-fit", path
        ) from None
    if not fit.loaded:
        raise _weights_error(
            f"no tensor of {str(path)!r} fits this model by name and shape. It has {_summarize(tensors)}; the model "
            f"has {_summarize(model.state_dict())}. Use weights of this model, or set model.name to theirs.",
            "weights-do-not-fit",
            path,
        )
    _report(fit, weights, path, head, complete)
    return head


def find_head(model: nn.Module, num_classes: int) -> str | None:
    """Return the name of the last linear or convolutional layer with `num_classes` outputs, in module order."""
    outputs = {
        name: module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    return next((name for name in reversed(outputs) if outputs[name] == num_classes), None)


# ---- reading a file


def read_weights(path: Path, remedy: str) -> Any:
    """Read a file of weights to the CPU without running any code in it.

    Args:
        path: A `.safetensors` file, or a `.pth` or `.pt` file as torch.save writes it.
        remedy: The end of the message if the file is missing or damaged.

    Returns:
        The content: a mapping of names to tensors, or any other saved object.

    Raises:
        UsageError: If the file is missing, damaged, of another kind, or holds more than tensors.
    """
    where = repr(str(path))
    if path.is_dir():
        raise _weights_error(f"{where} is a folder. Name the file in it.", "weights-unreadable", path)
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise _weights_error(
            f"expected a file name that ends in {', '.join(WEIGHTS_SUFFIXES)}, got {where}.", "weights-unreadable", path
        )
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except FileNotFoundError:
        raise _weights_error(f"{where}: there is no such file. {remedy}", "weights-missing", path) from None
    except OSError as error:
        raise _weights_error(
            f"{where} cannot be read ({error.strerror}). {remedy}", "weights-unreadable", path
        ) from None
    if is_empty:
        raise _weights_error(f"{where} is empty. {remedy}", "weights-damaged", path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        problem = f"{where} is damaged or not a safetensors file ({error}). {remedy}"
        raise _weights_error(problem, "weights-damaged", path) from None
    except Exception as error:  # a damaged pickle can raise anything: KeyError, struct.error, AssertionError, ...
        # torch reports a refused global only in its text.
        foreign = re.search(r"GLOBAL (\S+)|TorchScript", str(error))
        if foreign is None:
            problem = f"{where} is damaged or not a file of torch.save ({type(error).__name__}). {remedy}"
            raise _weights_error(problem, "weights-damaged", path) from None
        raise _weights_error(
            f"{where} holds more than tensors ({foreign.group(1) or foreign.group()}). Loading it would run code of "
            "its author, so it is not loaded. If you trust it, save only the tensors: "
            "torch.save(model.state_dict(), FILE).",
            "weights-with-code",
            path,
        ) from None


def _weights_error(problem: str, code: str, path: Path) -> UsageError:
    return UsageError(f"model.weights: {problem}", code=code, key="model.weights", path=str(path))


def _unwrap(found: Any, path: Path, model: nn.Module) -> "OrderedDict[str, Tensor]":
    """Return the tensors by the model's own names, logging the nesting and prefixes that were removed."""
    removed = []
    while isinstance(found, Mapping) and (nest := next((key for key in _NESTS if _is_mapping(found, key)), None)):
        found = found[nest]
        removed.append(f"the nesting under {nest!r}")
    metadata = getattr(found, "_metadata", None)
    items = found.items() if isinstance(found, Mapping) else ()
    tensors = OrderedDict((key, value) for key, value in items if isinstance(key, str) and isinstance(value, Tensor))
    if not tensors:
        raise _weights_error(
            f"{str(path)!r} holds {type(found).__name__} without named tensors. "
            "Save a state_dict: torch.save(model.state_dict(), FILE).",
            "weights-without-tensors",
            path,
        )
    own = model.state_dict()
    # The modules' versions, by which a module recognizes an older layout of its tensors. MNASNet requires its own.
    tensors._metadata = dict(metadata or {"": own._metadata[""]})  # type: ignore[attr-defined]
    while prefix := next((text for text in _PREFIXES if _begin(tensors, text) and not _begin(own, text, any)), None):
        consume_prefix_in_state_dict_if_present(tensors, prefix)
        removed.append(f"the prefix {prefix!r}")
    for old in list(tensors):
        match = _OLD_DENSENET.fullmatch(old)
        if match and (name := match[1] + match[2]) in own:
            tensors[name] = tensors.pop(old)
    if removed and env_rank() == 0:
        log.info("model.weights: %s: removed %s", path, ", ".join(removed))
    return tensors


def _is_mapping(found: Mapping[Any, Any], key: str) -> bool:
    return isinstance(found.get(key), Mapping)


def _begin(names: Iterable[str], prefix: str, how: Callable[[Iterable[bool]], bool] = all) -> bool:
    return how(name.startswith(prefix) for name in names)


# ---- loading into the model


@dataclass(frozen=True)
class _Fit:
    """How a file's tensors fit a model, its head aside."""

    loaded: list[str]
    """Names of the tensors that were loaded."""
    misfits: list[str]
    """Lines on tensors that do not fit the model's tensor of the same name."""
    missing: list[str]
    """Names of the model's tensors that the file lacks."""
    unexpected: list[str]
    """Names of the file's tensors that the model lacks."""
    with_nan: list[str]
    """Names of loaded tensors with a NaN."""

    @property
    def listed(self) -> str:
        """Everything that did not fit, one line each, empty if all did."""
        kinds = {
            "did not fit": self.misfits,
            "not in the file, left as drawn": self.missing,
            "in the file, not in the model": self.unexpected,
        }
        return "".join(f"\n  {kind}: {name}" for kind, names in kinds.items() for name in names)


def _load(model: nn.Module, tensors: "OrderedDict[str, Tensor]", head: str | None) -> _Fit:
    own = model.state_dict()
    in_head = {name for name in {*own, *tensors} if head is not None and name.startswith(f"{head}.".lstrip("."))}
    misfits, with_nan = {}, []
    for name, tensor in tensors.items():
        if name in own and name not in in_head:
            problem = _misfit(tensor, own[name])
            if problem is not None:
                misfits[name] = f"{name}: {problem}"
            elif tensor.is_floating_point() and tensor.isnan().any():
                with_nan.append(name)
    fitting = OrderedDict((name, tensor) for name, tensor in tensors.items() if name not in {*in_head, *misfits})
    fitting._metadata = tensors._metadata  # type: ignore[attr-defined]
    # Not strict, so that the modules' own hooks apply, which know older names (vit's mlp.linear_1).
    result = model.load_state_dict(fitting, strict=False)
    missing = [name for name in result.missing_keys if name not in {*in_head, *misfits}]
    loaded = [name for name in fitting if name not in result.unexpected_keys]
    expected = _AUXILIARY if isinstance(model, torchvision.models.GoogLeNet | torchvision.models.Inception3) else ()
    unexpected = [name for name in result.unexpected_keys if not name.startswith(expected)]
    return _Fit(loaded, list(misfits.values()), missing, unexpected, with_nan)


def _misfit(tensor: Tensor, own: Tensor) -> str | None:
    """Return why a tensor of the file cannot replace the model's own, None if it can."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return "not a plain tensor in the file"
    if (tensor.is_floating_point(), tensor.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return f"{_dtype(tensor)} in the file, {_dtype(own)} in the model"  # integers that encode others: quantized
    if tensor.shape != own.shape:
        return f"{tuple(tensor.shape)} in the file, {tuple(own.shape)} in the model"
    if tensor.is_floating_point() and tensor.numel() and tensor.isnan().all():
        return "nothing but NaN in the file"  # a placeholder for missing values
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _summarize(tensors: Mapping[str, Tensor]) -> str:
    names = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    return ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if len(names) > 3 else "")


def _report(fit: _Fit, source: str, path: Path, head: str | None, complete: bool) -> None:
    """Log on rank 0 what was loaded, or raise UsageError if weights that must be `complete` are not."""
    if complete and fit.listed:
        raise _weights_error(
            f"{str(path)!r} does not hold {source}:{fit.listed}\n"
            "  Delete that file to download it again, or set model.weights to its path to load what fits.",
            "weights-incomplete",
            path,
        )
    if env_rank() != 0:
        return
    if fit.listed:
        log.warning("model.weights: only %d tensors of %s were loaded:%s", len(fit.loaded), path, fit.listed)
    if fit.with_nan:
        log.warning("model.weights: %s has NaN in %s", path, ", ".join(fit.with_nan))
    drawn = f"the head {head!r} is drawn from the seed" if head is not None else "no head was found"
    log.info("model.weights: %d tensors from %s; %s", len(fit.loaded), path, drawn)
