"""Is the optimizer bound to this model, the scheduler to this optimizer, and every tensor to its own memory?"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


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


def check_wiring(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any = None,
    criterion: nn.Module | None = None,
) -> None:
    """Checks by identity that model, optimizer and scheduler belong together.

    `criterion`: the loss, where it has parameters of its own, which the optimizer may train, too.

    Raises ValueError for what is no model or optimizer, and WiringError, with the cause
    - `optimizer-not-bound`: the optimizer holds parameters that are not this model's, nor the criterion's;
    - `parameters-not-optimized`: a trainable parameter is in no parameter group, or in one twice;
    - `scheduler-not-bound`: the scheduler drives another optimizer;
    - `storage-shared`: two different parameters or buffers overlap in memory. (Tied weights, one parameter under two
      names, are fine.)
    """
    for name, value, is_one in (
        ("model", model, isinstance(model, nn.Module)),
        ("optimizer", optimizer, optimizer is None or hasattr(optimizer, "param_groups")),
    ):
        if not is_one:
            raise ValueError(
                f"{name}: a {type(value).__name__} will not do: give one; of several models, check each with its own "
                "optimizer."
            )
    if optimizer is not None:
        _check_optimizer(model, optimizer, criterion)
        if scheduler is not None:
            _check_scheduler(optimizer, scheduler)
    _check_storage(model)


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module | None) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if criterion is not None:
        names |= {id(parameter): f"criterion.{name}" for name, parameter in criterion.named_parameters()} | names
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    orphans = [parameter for parameter in held if id(parameter) not in names]
    kind = type(optimizer).__name__
    if orphans:
        raise WiringError(
            "optimizer-not-bound",
            f"{len(orphans)} of the {len(held)} parameters in the {kind} optimizer are not parameters of this model, "
            f"so stepping it does not train the model. {_guess_origin(model, held, orphans)}",
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


def _guess_origin(model: nn.Module, held: list[Tensor], orphans: list[Tensor]) -> str:
    if len(orphans) < len(held):
        return "The rest are: a layer of the model was replaced or added to after the optimizer was made."
    own = Counter(tuple(parameter.shape) for parameter in model.parameters())
    if Counter(tuple(parameter.shape) for parameter in orphans) - own:
        return "Their shapes are not this model's: the optimizer was made for another model."
    return (
        "They have the shapes of this model's: the optimizer belongs to another instance of the model, or the model or "
        "the optimizer was deep-copied by itself. copy.deepcopy(optimizer) copies the parameters too, so the copy's "
        "belong to no model at all and nobody learns."
    )


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


@dataclass(frozen=True)
class _Span:
    """The stretch of memory from a tensor's first byte to its last."""

    device: str
    start: int
    end: int
    name: str
    tensor: Tensor

    @property
    def is_dense(self) -> bool:
        """Whether the tensor fills it: then every other tensor that reaches into it shares memory."""
        filled = self.tensor.numel() * self.tensor.element_size()
        return self.end - self.start == filled and 0 not in self.tensor.stride()


def _check_storage(model: nn.Module) -> None:
    pending: list[_Span] = []
    for span in sorted(_spans(model), key=lambda span: (span.device, span.start, span.end)):
        pending = [other for other in pending if other.device == span.device and other.end > span.start]
        for other in pending:
            if _share_bytes(other, span):
                raise WiringError(
                    "storage-shared",
                    f"{other.name!r} and {span.name!r} are different tensors in the same memory: an update of one "
                    "changes the other behind its optimizer's back.",
                    span.name,
                    [
                        f"# to tie them: register one parameter under both names ({span.name} = {other.name})",
                        f"# to keep them apart: initialise {span.name} with .detach().clone()",
                    ],
                )
        pending.append(span)


def _spans(model: nn.Module) -> Iterator[_Span]:
    """Of every parameter and buffer that has memory; a tensor under several names once."""
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen or is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            continue
        seen.add(id(tensor))
        if tensor.numel():
            start = tensor.data_ptr()
            yield _Span(str(tensor.device), start, start + _extent(tensor) * tensor.element_size(), name, tensor)


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share_bytes(one: _Span, other: _Span) -> bool:
    """Whether two tensors whose spans overlap have a byte in common: columns of one matrix, interleaved, do not."""
    if one.is_dense and other.is_dense:
        return True
    start, end = min(one.start, other.start), max(one.end, other.end)
    taken = torch.zeros(2, end - start, dtype=torch.bool)
    for row, span in zip(taken, (one, other), strict=True):
        size = span.tensor.element_size()
        bytes_of_elements = row[span.start - start : span.end - start].view(-1, size)
        bytes_of_elements.as_strided((*span.tensor.shape, size), (*(s * size for s in span.tensor.stride()), 1)).fill_(
            1
        )
    return bool(taken.all(dim=0).any())
