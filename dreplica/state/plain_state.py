"""State in plain Python: what objects hold beside what a state_dict knows, kept and put back exactly as it was.

A counter that each forward pass raises, a generator of a module's own, a tensor that was never registered: the next
step may depend on any of them.
"""

import logging
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dreplica.state.fingerprint.fingerprint import num_bytes
from dreplica.state.tensors import overwrite

log = logging.getLogger(__name__)

_DICTS = frozenset({dict, OrderedDict, defaultdict, Counter})
_SEQUENCES = frozenset({list, deque})
_LAYOUTS = frozenset({torch.strided, torch.sparse_coo})
_LEFT_ALONE = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
    | {nn.Parameter, type, FunctionType, BuiltinFunctionType, MethodType}
)
"""Of the common types those that hold nothing that changes, or nothing that is kept here."""

GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    random.Random: (random.Random.getstate, random.Random.setstate),
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    numpy.random.RandomState: (numpy.random.RandomState.get_state, numpy.random.RandomState.set_state),
    numpy.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}
"""Type to how its state is read and set."""


@dataclass(frozen=True)
class KeptTensor:
    """A tensor, and what was in it."""

    tensor: Tensor
    memory: Tensor | None
    """The same memory, shape and strides under another Python object, which stays as it is when `tensor` is resized or
    pointed elsewhere (`tensor.data = ...`); None of what is no plain stretch of memory (sparse, subclasses)."""
    values: Tensor
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "KeptTensor":
        """A copy of the tensor as it is."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        memory = tensor.data if plain and not tensor.is_meta else None
        return cls(tensor, memory, tensor.detach().clone(), tensor.requires_grad)

    def put_back(self) -> None:
        """Writes the values into the tensor, where it was; the tensor object stays the same."""
        if self.tensor.is_leaf and self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        if self.memory is None:
            overwrite(self.tensor, self.values)
            return
        try:
            overwrite(self.memory, self.values)
        except RuntimeError:  # the memory was given up: `storage.resize_(0)`
            self.tensor.data = self.values.clone()
            return
        if not self.tensor.is_set_to(self.memory):
            self.tensor.data = self.memory


class PlainState:
    """What the attributes of some objects are bound to, and what these hold; `restore` puts it back, as often as asked.

    Kept are numbers, strings, bytes; lists, tuples, dicts, sets and deques; tensors, NumPy arrays, and generators of
    random numbers, Python's, NumPy's and torch's. All else (locks, files, functions, other objects) is left alone, as
    are parameters. Attributes are bound again to the very objects that they were bound to, whose contents are put back
    in place, so that other references to them stay good; attributes added since are removed. Only a tensor that
    autograd has made comes back as a copy without its graph, since to keep it would keep all that the graph holds.

    Args:
        owners: objects whose attributes are state.
        known: tensors that are kept elsewhere.
        enter: which of the objects found on the way are owners, too.
        max_bytes: larger tensors and arrays are left alone; None: however large.
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
        """Puts everything back."""
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
            tensor.put_back()
        for array, values in self._arrays:
            if array.flags.writeable and (array.shape, array.dtype) == (values.shape, values.dtype):
                array[...] = values
        for generator, state in self._generators:
            GENERATORS[type(generator)][1](generator, state)

    def _open(self, owner: object) -> None:
        attributes = getattr(owner, "__dict__", None)
        if type(attributes) is dict and id(attributes) not in self._seen:
            self._seen.add(id(attributes))
            self._pending.append(attributes)

    def _keep(self, value: Any) -> None:
        kind = type(value)
        if kind in _DICTS:
            contents = dict(value)
            for key, item in contents.items():
                if type(item) not in _LEFT_ALONE:
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
            # One made in inference mode cannot be written to outside of it.
            if tensor.layout in _LAYOUTS and not tensor.is_inference() and self._is_small(num_bytes(tensor)):
                self._tensors.append(KeptTensor.of(tensor))
        except RuntimeError as error:  # its bytes are not its own: a wrapper that torch.func has left behind
            log.debug("a tensor is not kept: %s", error)

    def _note(self, item: Any) -> Any:
        """Has `item` kept. Returns what to put back in its place: itself, or a copy where autograd has made it."""
        if type(item) in _LEFT_ALONE:
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
        if id(tensor) in self._seen:  # kept elsewhere
            return tensor
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.detach().clone()
        return self._copies[id(tensor)]

    def _is_small(self, size: int) -> bool:
        return self._max_bytes is None or size <= self._max_bytes


def _refill(held: Any, contents: dict[Any, Any]) -> None:
    # By identity: two tensors, the keys of an optimizer's state, cannot be compared to one bool.
    if len(held) != len(contents) or any(one is not other for one, other in zip(held, contents, strict=True)):
        held.clear()
    for key, value in contents.items():
        if key not in held or held[key] is not value:
            held[key] = value
