"""Operators that return wrong results, as those of a broken arithmetic unit do."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreplica.config.messages import nearest
from dreplica.errors import UsageError


class FaultyOperators(TorchDispatchMode):
    """Dispatch mode that corrupts the result of the first call of chosen operators in a step.

    It is entered before the first step and left after the last one, so that it lies beneath every mode that is entered
    in between: a tracer sees the operator itself return the wrong result. Between steps it changes nothing.

    Args:
        names: Operators with namespace and overload, such as `aten.relu.default`.
        corrupt: Called with the name of an operator and its first tensor result, to corrupt it in place.

    Raises:
        UsageError: There is no operator of such a name.
    """

    def __init__(self, names: Collection[str], corrupt: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        for name in names:
            _check_exists(name)
        self._names, self._corrupt = frozenset(names), corrupt
        self._pending: set[str] = set()
        self._step: int | None = None

    def begin(self, step: int) -> None:
        """Corrupt from now on, until `end`. Calling it again within one step changes nothing."""
        if self._step != step:
            self._step, self._pending = step, set(self._names)

    def end(self) -> None:
        """Corrupt nothing until the next step begins."""
        self._step, self._pending = None, set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Keep compiled code compiled in this mode. Called by torch."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func)
        if name in self._pending:
            written = [args[i] for i, each in enumerate(func._schema.arguments[: len(args)]) if _is_written(each)]
            # Of no other class: while a model is being compiled, its operators get fake tensors.
            tensors = [leaf for leaf in tree_leaves((result, written, kwargs.get("out"))) if type(leaf) is Tensor]
            tensors = [tensor for tensor in tensors if tensor.numel() and not tensor.is_meta]
            if tensors:
                self._pending.remove(name)
                self._corrupt(name, tensors[0])
        return result


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _check_exists(name: str) -> None:
    namespace, _, rest = name.partition(".")
    operator, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), operator, None) if namespace and operator else None
    if isinstance(getattr(packet, overload or "-", None), torch._ops.OpOverload):
        return
    if overload or packet is None:
        known = (name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names())
        names = {name if name.count(".") > 1 else f"{name}.default" for name in known}
    else:
        names = {f"{name}.{each}" for each in packet.overloads()}
        names = names & {f"{name}.default"} or names
    raise UsageError(
        f"inject: no operator {name!r} in target 'operator'. {nearest(name, names)}",
        code="unknown-operator",
        target="operator",
        tensor=name,
    )
