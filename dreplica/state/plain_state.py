"""Copies of Python attributes, which no `state_dict` contains, and their exact restoration.

The next training step may depend on any of them: a counter that each forward pass increments, a module's private random
generator, a tensor that was never registered as a buffer.
"""

import logging
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dreplica.state.fingerprint.fingerprint import num_bytes
from dreplica.state.tensors import overwrite

log = logging.getLogger(__name__)

DICT_TYPES = frozenset({dict, OrderedDict, defaultdict, Counter})
"""Mappings whose contents are copied and restored."""
_SEQUENCES = frozenset({list, deque})
_LAYOUTS = frozenset({torch.strided, torch.sparse_coo})
VALUE_TYPES = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
"""Types whose values never change, so that an attribute differs only if it was bound again."""
SKIPPED_TYPES = VALUE_TYPES | {nn.Parameter, type, FunctionType, BuiltinFunctionType, MethodType}
"""Common types whose values never change, or are not copied here."""

GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    random.Random: (random.Random.getstate, random.Random.setstate),
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    numpy.random.RandomState: (numpy.random.RandomState.get_state, numpy.random.RandomState.set_state),
    numpy.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}
"""Functions that get and set the state of each generator type."""


@dataclass(frozen=True)
class KeptTensor:
    """A tensor with a copy of its values."""

    tensor: Tensor
    """The tensor itself."""
    memory: Tensor | None
    """A second tensor object with the same memory, shape and strides.

    It is unaffected when `tensor` is resized or given other memory (`tensor.data = ...`). None for sparse tensors,
    tensor subclasses and tensors on the meta device.
    """
    values: Tensor
    """The copied values, on the tensor's device."""
    requires_grad: bool
    """The tensor's `requires_grad` when it was copied."""

    @classmethod
    def of(cls, tensor: Tensor, values: Tensor | None = None) -> "KeptTensor":
        """Copy the values of a tensor.

        Args:
            tensor: The tensor.
            values: The copied values, if they exist already.
        """
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        memory = tensor.data if plain and not tensor.is_meta else None
        return cls(tensor, memory, tensor.detach().clone() if values is None else values, tensor.requires_grad)

    def restore(self) -> None:
        """Write the values back into the same tensor object and the same memory."""
        if self.tensor.is_leaf and self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        if self.memory is None:
            overwrite(self.tensor, self.values)
            return
        try:
            overwrite(self.memory, self.values)
        except RuntimeError:  # the memory was freed: `storage.resize_(0)`
            self.tensor.data = self.values.clone()
            return
        if not self.tensor.is_set_to(self.memory):
            self.tensor.data = self.memory


class PlainState:
    """A copy of the attributes of some objects, which `restore` writes back any number of times.

    Copied are numbers, strings and bytes; lists, tuples, dicts, sets and deques; tensors and NumPy arrays; the random
    generators of Python, NumPy and torch. Parameters and objects of other types (locks, files, functions) are not.

    An attribute is bound again to the object that it was bound to, and that object's contents are restored in place, so
    that other references to it remain valid. Attributes added since the copy are removed. There is one exception: a
    tensor made by autograd is restored as a copy without its graph, because the graph would keep activations alive.

    Args:
        owners: Objects whose attributes are copied.
        known: Tensors that are copied elsewhere and are left out here.
        enter: Returns True for objects among the attribute values whose own attributes are copied, too.
        max_bytes: Size limit: larger tensors and arrays are left out. None for no limit.
    """

    def __init__(
        self,
        owners: Iterable[object],
        known: Iterable[Tensor] = (),
        enter: Callable[[object], bool] = lambda _: False,
        max_bytes: int | None = None,
    ) -> None:
        self._dicts: list[tuple[Any, dict[Any, Any]]] = []
        self._sequences: list[tuple[Any, list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._tensors: list[KeptTensor] = []
        self._arrays: list[tuple[numpy.ndarray, numpy.ndarray]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._enter, self._max_bytes = enter, max_bytes
        self._seen = {id(tensor) for tensor in known}
        self._pending: list[Any] = []
        self._copies: dict[int, Tensor] = {}
        for owner in owners:
            self._open(owner)
        while self._pending:
            self._keep(self._pending.pop())
        del self._seen, self._copies

    def restore(self) -> None:
        """Restore all attributes and their contents."""
        for owner, contents in self._dicts:
            _refill(owner, contents)
        for sequence, items in self._sequences:
            if len(sequence) != len(items) or any(one is not other for one, other in zip(sequence, items, strict=True)):
                sequence.clear()
                sequence.extend(items)
        for held, members in self._sets:
            if held != members:
                held.clear()
                held.update(members)
        for tensor in self._tensors:
            tensor.restore()
        for array, values in self._arrays:
            if array.flags.writeable and (array.shape, array.dtype) == (values.shape, values.dtype):
                array[...] = values
        for generator, state in self._generators:
            GENERATORS[type(generator)][1](generator, state)

    def leaves(self, owners: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what was copied by path: `head.calls`, `optimizer.param_groups.0.lr`.

        Args:
            owners: The owners whose attributes to return, by path.

        Returns:
            Numbers, strings and other values that never change, and the states of random generators.
        """
        contents: dict[int, Iterable[tuple[Any, Any]]] = {id(held): copied.items() for held, copied in self._dicts}
        contents |= {id(held): enumerate(items) for held, items in self._sequences}
        states = {id(generator): state for generator, state in self._generators}
        values: dict[str, Any] = {}
        generators: dict[str, Any] = {}
        pending: list[tuple[str, Any]] = [(path, getattr(owner, "__dict__", None)) for path, owner in owners.items()]
        while pending:
            path, value = pending.pop()
            if type(value) in VALUE_TYPES:
                values[path] = value
            elif id(value) in states:
                generators[path] = states[id(value)]
            else:
                for position, (key, item) in enumerate(contents.pop(id(value), ())):
                    pending.append((f"{path}.{key if isinstance(key, str) else position}", item))
        return values, generators

    def _open(self, owner: object) -> None:
        attributes = getattr(owner, "__dict__", None)
        if type(attributes) is dict and id(attributes) not in self._seen:
            self._seen.add(id(attributes))
            self._pending.append(attributes)

    def _keep(self, value: Any) -> None:
        kind = type(value)
        if kind in DICT_TYPES:
            contents = dict(value)
            for key, item in contents.items():
                if type(item) not in SKIPPED_TYPES:
                    contents[key] = self._note(item)
            self._dicts.append((value, contents))
        elif kind in _SEQUENCES:
            self._sequences.append((value, [self._note(item) for item in list(value)]))
        elif isinstance(value, tuple | frozenset):
            for item in value:
                self._note(item)
        elif kind is set:
            self._sets.append((value, value.copy()))
        elif kind is Tensor:
            self._keep_tensor(value)
        elif kind is numpy.ndarray:
            if self._is_small(value.nbytes) and value.flags.writeable:
                self._arrays.append((value, value.copy()))
        elif kind in GENERATORS:
            self._generators.append((value, GENERATORS[kind][0](value)))
        elif self._enter(value):
            self._open(value)

    def _keep_tensor(self, tensor: Tensor) -> None:
        try:
            # A tensor made in inference mode cannot be written to outside of it.
            if tensor.layout in _LAYOUTS and not tensor.is_inference() and self._is_small(num_bytes(tensor)):
                self._tensors.append(KeptTensor.of(tensor))
        except RuntimeError as error:  # it has no memory: a wrapper that a torch.func transform has left behind
            log.debug("tensor not copied: %s", error)

    def _note(self, item: Any) -> Any:
        """Schedule an item to be copied, and return the object to restore: the item, or a copy without its graph."""
        if type(item) in SKIPPED_TYPES:
            return item
        if type(item) is Tensor and item.grad_fn is not None:
            item = self._without_graph(item)
        elif type(item) is tuple and any(type(part) is Tensor and part.grad_fn is not None for part in item):
            item = tuple(self._note(part) for part in item)
        if id(item) not in self._seen:
            self._seen.add(id(item))
            self._pending.append(item)
        return item

    def _without_graph(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._seen:  # copied elsewhere
            return tensor
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.detach().clone()
        return self._copies[id(tensor)]

    def _is_small(self, size: int) -> bool:
        return self._max_bytes is None or size <= self._max_bytes


def _refill(held: Any, contents: dict[Any, Any]) -> None:
    # By identity: the keys of an optimizer's state are tensors, whose comparison is not a bool.
    if len(held) != len(contents) or any(one is not other for one, other in zip(held, contents, strict=True)):
        held.clear()
    for key, value in contents.items():
        if key not in held or held[key] is not value:
            held[key] = value
