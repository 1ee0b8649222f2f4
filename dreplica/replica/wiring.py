"""Is the optimizer bound to this model, the scheduler to this optimizer, and every tensor to its own memory?"""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class WiringError(ValueError):
    """A replica's parts do not belong together. `cause` is the verdict's code; `remedy` is what to write instead."""

    def __init__(self, cause: str, message: str, tensor: str | None, remedy: list[str]) -> None:
        super().__init__(cause, message, tensor, remedy)
        self.cause = cause
        self.message = message
        self.tensor = tensor
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message


def check_wiring(model: nn.Module, optimizer: torch.optim.Optimizer | None, scheduler: Any = None) -> None:
    """Checks by identity that model, optimizer and scheduler belong together.

    Raises WiringError, with the cause
    - `optimizer-not-bound`: the optimizer holds parameters that are not this model's;
    - `parameters-not-optimized`: a trainable parameter is in no parameter group, or in one twice;
    - `scheduler-not-bound`: the scheduler drives another optimizer;
    - `storage-shared`: two different parameters or buffers overlap in memory. (Tied weights, one parameter under two
      names, are fine.)
    """
    if optimizer is not None:
        _check_optimizer(model, optimizer)
        if scheduler is not None:
            _check_scheduler(optimizer, scheduler)
    _check_storage(model)


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    orphans = [parameter for parameter in held if id(parameter) not in names]
    kind = type(optimizer).__name__
    if orphans:
        raise WiringError(
            "optimizer-not-bound",
            f"{len(orphans)} of the {len(held)} parameters in the {kind} optimizer are not parameters of this model, "
            f"so stepping it does not train the model. {_guess_origin(model, orphans)}",
            None,
            [
                f"optimizer = torch.optim.{kind}(model.parameters(), ...)  # after the model is final",
                "model, optimizer = copy.deepcopy((model, optimizer))  # both in one call, if you copy",
            ],
        )
    counts = Counter(id(parameter) for parameter in held)
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and not counts[id(parameter)]
    ]
    if missing:
        raise WiringError(
            "parameters-not-optimized",
            f"{len(missing)} trainable parameters are in no parameter group of the {kind} optimizer and will never "
            f"change, first {missing[0]!r}.",
            missing[0],
            [
                f"optimizer = torch.optim.{kind}(model.parameters(), ...)  # after the last layer is in place",
                f"model.get_parameter({missing[0]!r}).requires_grad_(False)  # if it is meant to stay as it is",
            ],
        )
    twice = [names[key] for key, count in counts.items() if count > 1]
    if twice:
        raise WiringError(
            "parameters-not-optimized",
            f"{len(twice)} parameters are more than once in the {kind} optimizer and are updated each time, "
            f"first {twice[0]!r}.",
            twice[0],
            [f"optimizer = torch.optim.{kind}(model.parameters(), ...)  # every parameter once"],
        )


def _guess_origin(model: nn.Module, orphans: list[Tensor]) -> str:
    own = Counter(tuple(parameter.shape) for parameter in model.parameters())
    if not Counter(tuple(parameter.shape) for parameter in orphans) - own:
        return (
            "They have the shapes of this model's: the optimizer belongs to another instance of the model, or was "
            "deep-copied by itself. copy.deepcopy(optimizer) copies the parameters too, so the copy's parameters "
            "belong to no model at all and nobody learns."
        )
    return "The model was changed after the optimizer was made, or the optimizer was made for another model."


def _check_scheduler(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    for part in _scheduler_parts(scheduler):
        driven = getattr(part, "optimizer", None)
        if driven is not None and driven is not optimizer:
            kind = type(part).__name__
            raise WiringError(
                "scheduler-not-bound",
                f"the {kind} scheduler drives another optimizer, so this one's learning rate never changes. "
                "(copy.deepcopy(scheduler) copies the optimizer inside it.)",
                None,
                [f"scheduler = torch.optim.lr_scheduler.{kind}(optimizer, ...)  # with the optimizer that steps"],
            )


def _scheduler_parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", []):
        yield from _scheduler_parts(part)


def _check_storage(model: nn.Module) -> None:
    spans = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() and _is_dense(tensor):
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + tensor.numel() * tensor.element_size(), name))
    spans.sort()
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(spans):
        if device == next_device and start < end:
            raise WiringError(
                "storage-shared",
                f"{name!r} and {next_name!r} are different tensors in the same memory: an update of one changes the "
                "other behind its optimizer's back.",
                next_name,
                [
                    f"# to tie them: register one parameter under both names ({next_name} = {name})",
                    f"# to keep them apart: initialise {next_name} with .detach().clone()",
                ],
            )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in some order of dimensions: then its span is exact."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return span == tensor.numel()
