"""Identity checks that model, criterion, optimizer and scheduler belong together.

The checks read no values and run no step. They catch setups that train nothing, or something other than intended,
without any exception from torch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.errors import DreplicaError, UsageError


class WiringError(DreplicaError, ValueError):
    """A fault in how model, optimizer and scheduler are connected.

    Args:
        text: The message for people.
        code: The cause: `optimizer-not-bound`, `parameters-not-optimized`, `scheduler-not-bound` or `storage-shared`.
        tensor: Name of the first tensor concerned, None if the fault concerns no single tensor.
        remedies: What to do, each an alternative.
        **fields: Further data that the text is made from.

    Attributes:
        code: The cause, as in a verdict.
        fields: The data that the text is made from, `tensor` and `remedies` included.
    """

    def __init__(
        self, text: str, *, code: str, tensor: str | None = None, remedies: Sequence[Remedy] = (), **fields: Any
    ) -> None:
        super().__init__(text, code=code, tensor=tensor, remedies=list(remedies), **fields)

    @property
    def tensor(self) -> str | None:
        """Name of the first tensor concerned, None if the fault concerns no single tensor."""
        return self.fields["tensor"]

    @property
    def remedies(self) -> list[Remedy]:
        """What to do, each an alternative."""
        return self.fields["remedies"]


def check_wiring(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Any = None,
    criterion: nn.Module | None = None,
) -> None:
    """Check by identity that model, optimizer and scheduler belong together.

    Call it once model, optimizer and scheduler are final. It needs no step and no process group, and changes nothing.
    The cause is in the error's `code`:

    - `optimizer-not-bound`: the optimizer holds parameters that belong to neither the model nor the criterion.
    - `parameters-not-optimized`: a trainable parameter is in no parameter group, or in the groups twice.
    - `scheduler-not-bound`: the scheduler, or one that it chains, drives another optimizer.
    - `storage-shared`: two different parameters or buffers overlap in memory. Tied weights, which are one parameter
      under two names, are fine.

    Args:
        model: The model to train.
        optimizer: The optimizer that trains it. None checks only the model's memory.
        scheduler: The learning rate scheduler, None if there is none.
        criterion: The loss module, if the optimizer may train its parameters, too.

    Raises:
        WiringError: If they do not belong together.
        UsageError: If `model` is not an `nn.Module`, or `optimizer` has no `param_groups`.
    """
    if not isinstance(model, nn.Module):
        raise _wrong_type("model", "an nn.Module", model)
    if optimizer is not None:
        if not hasattr(optimizer, "param_groups"):
            raise _wrong_type("optimizer", "a torch.optim.Optimizer or None", optimizer)
        _check_optimizer(model, optimizer, criterion)
        if scheduler is not None:
            _check_scheduler(optimizer, scheduler)
    _check_storage(model)


def _wrong_type(name: str, expected: str, value: object) -> UsageError:
    found = type(value).__name__
    text = f"{name} must be {expected}, got {found}. Check each model with its own optimizer, in one call per model."
    return UsageError(text, code="wrong-type", argument=name, expected=expected, found=found)


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module | None) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if criterion is not None:
        names |= {id(parameter): f"criterion.{name}" for name, parameter in criterion.named_parameters()} | names
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    orphans = [parameter for parameter in held if id(parameter) not in names]
    kind = type(optimizer).__name__
    if orphans:
        raise WiringError(
            f"{len(orphans)} of the {len(held)} parameters in the {kind} optimizer are not parameters of this model, "
            f"so optimizer.step() does not train the model. {_explain_orphans(model, held, orphans)}",
            code="optimizer-not-bound",
            remedies=[Remedy.of("create-optimizer-last", optimizer=kind), Remedy.of("copy-together")],
            optimizer=kind,
            num_orphans=len(orphans),
            num_parameters=len(held),
        )
    counts = Counter(id(parameter) for parameter in held)
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and not counts[id(parameter)]
    ]
    if missing:
        raise WiringError(
            f"{len(missing)} trainable parameters are in no parameter group of the {kind} optimizer and never change. "
            f"The first is {missing[0]!r}.",
            code="parameters-not-optimized",
            tensor=missing[0],
            remedies=[
                Remedy.of("create-optimizer-last", optimizer=kind),
                Remedy.of("freeze-parameter", tensor=missing[0]),
            ],
            optimizer=kind,
            missing=missing,
        )
    duplicates = [names[key] for key, count in counts.items() if count > 1]
    if duplicates:
        raise WiringError(
            f"{len(duplicates)} parameters are more than once in the {kind} optimizer and are updated more than once "
            f"per step. The first is {duplicates[0]!r}.",
            code="parameters-not-optimized",
            tensor=duplicates[0],
            remedies=[Remedy.of("pass-each-once", optimizer=kind)],
            optimizer=kind,
            duplicates=duplicates,
        )


def _explain_orphans(model: nn.Module, held: list[Tensor], orphans: list[Tensor]) -> str:
    """Return a sentence on where the optimizer's foreign parameters come from, judged by their shapes."""
    if len(orphans) < len(held):
        return "The others are: a layer of the model was replaced or extended after the optimizer was created."
    model_shapes = Counter(tuple(parameter.shape) for parameter in model.parameters())
    if Counter(tuple(parameter.shape) for parameter in orphans) - model_shapes:
        return "Their shapes differ from this model's: the optimizer was created for another model."
    return (
        "Their shapes are those of this model: the optimizer belongs to another instance of the model, or the model or "
        "the optimizer was deep-copied alone. copy.deepcopy(optimizer) also copies the parameters, so the copies "
        "belong to no model, and no model is trained."
    )


def _check_scheduler(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    for part in _flatten_scheduler(scheduler):
        driven = getattr(part, "optimizer", None)
        if driven is not None and driven is not optimizer:
            kind = type(part).__name__
            raise WiringError(
                f"the {kind} scheduler drives another optimizer, so the learning rate of this optimizer never changes. "
                "(copy.deepcopy(scheduler) also copies the optimizer that the scheduler holds.)",
                code="scheduler-not-bound",
                remedies=[Remedy.of("create-scheduler", scheduler=kind)],
                scheduler=kind,
            )


def _flatten_scheduler(scheduler: Any) -> Iterator[Any]:
    """Yield the scheduler and all schedulers that it chains (ChainedScheduler, SequentialLR)."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", []):
        yield from _flatten_scheduler(part)


@dataclass(frozen=True)
class _Span:
    """The address range from a tensor's first byte to its last."""

    device: str
    start: int
    end: int
    name: str
    tensor: Tensor

    @property
    def is_dense(self) -> bool:
        """True if the tensor uses every byte of the range, so that any tensor that overlaps it shares memory."""
        filled = self.tensor.numel() * self.tensor.element_size()
        return self.end - self.start == filled and 0 not in self.tensor.stride()


def _check_storage(model: nn.Module) -> None:
    # A sweep over addresses: a tensor is compared only with the earlier ones that reach past its start.
    pending: list[_Span] = []
    for span in sorted(_spans(model), key=lambda span: (span.device, span.start, span.end)):
        pending = [other for other in pending if other.device == span.device and other.end > span.start]
        for other in pending:
            if _share_bytes(other, span):
                raise WiringError(
                    f"{other.name!r} and {span.name!r} are different tensors in the same memory: an update of one also "
                    "changes the other.",
                    code="storage-shared",
                    tensor=span.name,
                    remedies=[
                        Remedy.of("tie-tensors", tensor=span.name, other=other.name),
                        Remedy.of("separate-tensors", tensor=span.name),
                    ],
                    other=other.name,
                )
        pending.append(span)


def _spans(model: nn.Module) -> Iterator[_Span]:
    """Yield the address range of each parameter and buffer that has memory, once for a tensor with several names."""
    seen = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen or is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            continue
        seen.add(id(tensor))
        if tensor.numel():
            start = tensor.data_ptr()
            yield _Span(str(tensor.device), start, start + _extent(tensor) * tensor.element_size(), name, tensor)


def _extent(tensor: Tensor) -> int:
    """Return the number of elements from the first to the last in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share_bytes(one: _Span, other: _Span) -> bool:
    """Return True if two tensors with overlapping ranges have a byte in common.

    Interleaved tensors, such as columns of one matrix, overlap in range but share no byte.
    """
    if one.is_dense and other.is_dense:
        return True
    start, end = min(one.start, other.start), max(one.end, other.end)
    used = torch.zeros(2, end - start, dtype=torch.bool)
    for row, span in zip(used, (one, other), strict=True):
        size = span.tensor.element_size()
        bytes_of_elements = row[span.start - start : span.end - start].view(-1, size)
        strides = (*(stride * size for stride in span.tensor.stride()), 1)
        bytes_of_elements.as_strided((*span.tensor.shape, size), strides).fill_(1)
    return bool(used.all(dim=0).any())
