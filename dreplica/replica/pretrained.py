"""Pretrained weights: torchvision's by name, or a file; everything but the head."""

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
_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Heads that torchvision's files have for training, and drops itself."""
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)")
"""torchvision's DenseNet files have names from when a module's name could hold a dot: norm.1 is norm1 today."""


def load_pretrained(model: nn.Module, weights: str, published: Any | None, num_classes: int) -> str | None:
    """Loads `weights` into `model` (CPU), all but its head: the last linear or convolutional layer with `num_classes`
    outputs. Returns the head's name, None if there is none.

    Draws no random numbers. Weights given by name must fit, all of them; of a file what does not fit is listed. Raises
    UsageError for a file that is not there, cannot be read, is more than tensors, or has none that fits.
    """
    if is_file(weights):
        path, remedy = Path(weights).expanduser(), f"Copy it again, or name another; a path is taken from {Path.cwd()}."
    else:
        path, remedy = fetch(published), "Delete that file, so that it is fetched again, or put a whole one there."
    if published is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        check_hash(path, published)
    tensors = _unwrap(read_weights(path, remedy), path, model)
    head = find_head(model, num_classes)
    # Of weights without categories (VGG16's IMAGENET1K_FEATURES) torchvision says itself that some are missing.
    complete = not is_file(weights) and bool(published and published.meta["categories"])
    try:
        fit = _load(model, tensors, head)
    except (RuntimeError, ValueError) as error:  # a module's own hook, or a conversion, that the shapes do not foretell
        raise UsageError(f"model.weights: {str(path)!r} does not load into this model: {error}") from None
    if not fit.loaded:
        raise UsageError(
            f"model.weights: no tensor of {str(path)!r} fits this model by name and shape. It has {_few(tensors)}; "
            f"the model has {_few(model.state_dict())}. Give weights of this model, or set model.name to theirs."
        )
    _report(fit, weights, path, head, complete)
    return head


def _few(tensors: Mapping[str, Tensor]) -> str:
    names = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    return ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if len(names) > 3 else "")


def find_head(model: nn.Module, num_classes: int) -> str | None:
    """The name of the last linear or convolutional layer with `num_classes` outputs, in the order of modules."""
    outputs = {
        name: module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    return next((name for name in reversed(outputs) if outputs[name] == num_classes), None)


# ---- what is in a file


def read_weights(path: Path, remedy: str) -> Any:
    """What a `.safetensors` file, or any other as torch.save writes it, holds, on the CPU; no code in it is run.

    Raises UsageError, which ends with `remedy` where the file is not there or damaged.
    """
    where = f"model.weights: {str(path)!r}"
    if path.is_dir():
        raise UsageError(f"{where} is a folder. Name the file in it.")
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise UsageError(f"{where} is no file of weights by its name. Those end in {', '.join(WEIGHTS_SUFFIXES)}.")
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except FileNotFoundError:
        raise UsageError(f"{where}: there is no such file. {remedy}") from None
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror}). {remedy}") from None
    if is_empty:
        raise UsageError(f"{where} is empty. {remedy}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UsageError(f"{where} is damaged or no safetensors file ({error}). {remedy}") from None
    except Exception as error:  # a damaged pickle can ask for anything: KeyError, struct.error, AssertionError, ...
        foreign = re.search(r"GLOBAL (\S+)|TorchScript", str(error))
        if foreign is None:
            raise UsageError(
                f"{where} is damaged or no file of torch.save ({type(error).__name__}). {remedy}"
            ) from None
        raise UsageError(
            f"{where} holds more than tensors ({foreign.group(1) or foreign.group()}), which would run code of its "
            "author's when loaded, so it is not loaded. Where you trust it, save the tensors alone: "
            "torch.save(model.state_dict(), FILE)."
        ) from None


def _unwrap(found: Any, path: Path, model: nn.Module) -> "OrderedDict[str, Tensor]":
    """The tensors by the model's own names; says what was taken off. Raises UsageError if there is no tensor."""
    taken = []
    while isinstance(found, Mapping) and (nest := next((key for key in _NESTS if _is_mapping(found, key)), None)):
        found = found[nest]
        taken.append(f"the nesting under {nest!r}")
    metadata = getattr(found, "_metadata", None)
    items = found.items() if isinstance(found, Mapping) else ()
    tensors = OrderedDict((key, value) for key, value in items if isinstance(key, str) and isinstance(value, Tensor))
    if not tensors:
        raise UsageError(
            f"model.weights: {str(path)!r} holds {type(found).__name__} without tensors by name. "
            "Save a state_dict: torch.save(model.state_dict(), FILE)."
        )
    own = model.state_dict()
    # The versions of modules, by which a module knows an older layout of its tensors; MNASNet insists on its own.
    tensors._metadata = dict(metadata or {"": own._metadata[""]})  # type: ignore[attr-defined]
    while prefix := next((text for text in _PREFIXES if _begin(tensors, text) and not _begin(own, text, any)), None):
        consume_prefix_in_state_dict_if_present(tensors, prefix)
        taken.append(f"the prefix {prefix!r}")
    for old in list(tensors):
        match = _OLD_DENSENET.fullmatch(old)
        if match and (name := match[1] + match[2]) in own:
            tensors[name] = tensors.pop(old)
    if taken and env_rank() == 0:
        log.info("model.weights: %s: took off %s", path, ", ".join(taken))
    return tensors


def _is_mapping(found: Mapping[Any, Any], key: str) -> bool:
    return isinstance(found.get(key), Mapping)


def _begin(names: Iterable[str], prefix: str, how: Callable[[Iterable[bool]], bool] = all) -> bool:
    return how(name.startswith(prefix) for name in names)


# ---- into the model


@dataclass(frozen=True)
class _Fit:
    """How a file's tensors went into a model, its head aside: a line each for what did not."""

    loaded: list[str]
    misfits: list[str]
    missing: list[str]
    unexpected: list[str]
    with_nan: list[str]

    @property
    def listed(self) -> str:
        """All that did not fit, as lines."""
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
    # Not strict, and by the modules' own hooks, which know older names (vit's mlp.linear_1).
    result = model.load_state_dict(fitting, strict=False)
    missing = [name for name in result.missing_keys if name not in {*in_head, *misfits}]
    loaded = [name for name in fitting if name not in result.unexpected_keys]
    expected = _AUXILIARY if isinstance(model, torchvision.models.GoogLeNet | torchvision.models.Inception3) else ()
    unexpected = [name for name in result.unexpected_keys if not name.startswith(expected)]
    return _Fit(loaded, list(misfits.values()), missing, unexpected, with_nan)


def _misfit(tensor: Tensor, own: Tensor) -> str | None:
    """Why a tensor of the file cannot be loaded in place of the model's own; None if it can."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return "no plain tensor in the file"
    if (tensor.is_floating_point(), tensor.is_complex()) != (own.is_floating_point(), own.is_complex()):
        return f"{_dtype(tensor)} in the file, {_dtype(own)} in the model"  # numbers that stand for others: quantised
    if tensor.shape != own.shape:
        return f"{tuple(tensor.shape)} in the file, {tuple(own.shape)} in the model"
    if tensor.is_floating_point() and tensor.numel() and tensor.isnan().all():
        return "nothing but NaN in the file"  # a place kept for values that are missing
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _report(fit: _Fit, source: str, path: Path, head: str | None, complete: bool) -> None:
    """Tells the user, once. Raises UsageError where nothing fits, or not all of what is `complete`."""
    if complete and fit.listed:
        raise UsageError(
            f"model.weights: {str(path)!r} does not hold {source}:{fit.listed}\n"
            "  Delete that file, so that it is fetched again, or give its path as model.weights to load what fits."
        )
    if env_rank() != 0:
        return
    if fit.listed:
        log.warning("model.weights: of %s only %d tensors were loaded:%s", path, len(fit.loaded), fit.listed)
    if fit.with_nan:
        log.warning("model.weights: %s has NaN in %s", path, ", ".join(fit.with_nan))
    drawn = f"the head {head!r} is drawn from the seed" if head is not None else "no head was recognised"
    log.info("model.weights: %d tensors from %s; %s", len(fit.loaded), path, drawn)
