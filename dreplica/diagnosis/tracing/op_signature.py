"""Tensors that an operator reads, and tensors that it writes completely, from its schema.

Uninitialized memory has other contents on each replica. Its digest would differ between replicas that have computed the
same, so arguments and results that may contain it are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_UNINITIALIZED = {
    "aten.empty",
    "aten.empty_like",
    "aten.empty_permuted",
    "aten.empty_strided",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten.resize_",
}
"""Operators whose whole result is uninitialized memory."""

_OVERWRITES = {
    *(f"aten.{name}_" for name in ("copy", "fill", "zero", "random", "bernoulli", "uniform", "normal", "exponential")),
    *(f"aten.{name}_" for name in ("log_normal", "cauchy", "geometric", "_foreach_copy", "_foreach_zero")),
}
"""Operators that overwrite their first argument without reading it."""

_SCRATCH_ARGUMENTS = {
    "aten._ctc_loss_backward": {"log_alpha"},
    "aten._cudnn_rnn_backward": {"reserve"},
    "aten._efficient_attention_backward": {"logsumexp", "philox_seed", "philox_offset"},
    "aten._flash_attention_backward": {"rng_state", "unused"},
    "aten._scaled_dot_product_cudnn_attention_backward": {"philox_seed", "philox_offset"},
    "aten._scaled_dot_product_efficient_attention_backward": {"logsumexp", "philox_seed", "philox_offset"},
    "aten._scaled_dot_product_flash_attention_backward": {"philox_seed", "philox_offset"},
    "aten.batch_norm_backward": {"reserve"},
    "aten.cudnn_batch_norm_backward": {"reserveSpace"},
    "aten.mkldnn_rnn_layer_backward": {"workspace"},
    "aten.rrelu_with_noise": {"noise"},
    "aten.rrelu_with_noise_": {"noise"},
    "aten.rrelu_with_noise_backward": {"noise"},
}
"""Arguments that may be partly uninitialized: workspaces, padding, states of unused generators.

Those of CPU operators were found by running torch's operator samples on memory filled with two different patterns.
Those of CUDA operators are buffers that a forward operator passes to its backward, sized by a library or rounded up.
"""

_SCRATCH_RESULTS = {
    "aten._batch_norm_with_update": {3},
    "aten._ctc_loss": {1},
    "aten._cudnn_rnn": {3},
    "aten._efficient_attention_forward": {1, 2, 3},
    "aten._flash_attention_forward": {2, 3, 4},
    "aten._scaled_dot_product_cudnn_attention": {6, 7, 8},
    "aten._scaled_dot_product_efficient_attention": {1, 2, 3},
    "aten._scaled_dot_product_flash_attention": {6, 7, 8},
    "aten.cudnn_batch_norm": {3},
    "aten.mkldnn_rnn_layer": {3},
}
"""Results that may be partly uninitialized, by position."""

_UNDECLARED_WRITES = {
    "aten.cudnn_batch_norm": {"running_mean", "running_var"},
    "aten.miopen_batch_norm": {"running_mean", "running_var"},
    "aten.native_batch_norm": {"running_mean", "running_var"},
}
"""Arguments that an operator updates although its schema does not declare it."""


_SAME_VIEWS = {"aten.alias.default", "aten.detach.default"}
"""Views of the whole input, unchanged."""

_FROM_HOST = {"aten.lift_fresh", "aten.lift", "aten.lift_fresh_copy"}
"""Operators that torch calls on a tensor that it has just made from Python or NumPy data."""


@dataclass(frozen=True)
class OpSignature:
    """Properties of an operator that are known before it runs."""

    name: str
    """Name with namespace and overload, such as `aten.convolution.default`."""
    arguments: tuple[str, ...]
    """Argument names, in the order of the schema."""
    recorded: bool
    """False for an operator whose result is meaningless until it is written, such as `aten.empty`."""
    is_view: bool
    """True if the result is a view of an argument's memory, so that nothing is computed."""
    shows_part: bool
    """True for a view of a part of the first argument, or of another form of it."""
    draws: bool
    """True if the operator draws random numbers."""
    written: frozenset[str]
    """Names of arguments that the operator writes to."""
    unread: frozenset[str]
    """Names of arguments that the operator does not read, or that may be partly uninitialized."""
    allocates: bool
    """True if the result is uninitialized memory."""
    from_host: bool
    """True if the result is a tensor just made from Python or NumPy data."""
    scratch_results: frozenset[int]
    """Positions of results that may be partly uninitialized."""

    @property
    def packet(self) -> str:
        """Name without overload."""
        return self.name.rpartition(".")[0]

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors that the operator reads, in the order of the call."""
        return tensors_in([value for name, value in self._named(args, kwargs) if name not in self.unread])

    def outputs(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the results and the arguments written to, each tensor once.

        Args:
            result: What the operator returned. An in-place operator returns the argument that it has written to.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        scratch = _SCRATCH_ARGUMENTS.get(self.packet, ())
        results = [result]
        if self.scratch_results:
            results = [item for position, item in enumerate(result) if position not in self.scratch_results]
        written = [value for name, value in self._named(args, kwargs) if name in self.written and name not in scratch]
        return list({id(tensor): tensor for tensor in tensors_in([results, written])}.values())

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        yield from zip(self.arguments, args, strict=False)
        yield from kwargs.items()


@cache
def signature_of(func: Any) -> OpSignature:
    """Return the signature of an operator overload that `__torch_dispatch__` received."""
    name = str(func)
    packet = name.rpartition(".")[0]
    arguments = func._schema.arguments
    aliased = [argument.alias_info.is_write for argument in arguments if argument.alias_info is not None]
    from_host = packet in _FROM_HOST
    is_view = bool(aliased) and not any(aliased) and not from_host
    written = {argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write}
    unread = {argument.name for argument in arguments if argument.is_out} | _SCRATCH_ARGUMENTS.get(packet, set())
    if packet in _OVERWRITES:
        unread.add(arguments[0].name)
    return OpSignature(
        name=name,
        arguments=tuple(argument.name for argument in arguments),
        recorded=func.namespace != "profiler" and packet not in _UNINITIALIZED,
        is_view=is_view,
        shows_part=is_view and name not in _SAME_VIEWS,
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        written=frozenset(written | _UNDECLARED_WRITES.get(packet, set())),
        unread=frozenset(unread),
        allocates=packet in _UNINITIALIZED,
        from_host=from_host,
        scratch_results=frozenset(_SCRATCH_RESULTS.get(packet, ())),
    )


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or results, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
