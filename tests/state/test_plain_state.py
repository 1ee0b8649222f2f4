"""Exact restoration of attributes: values, generators, bindings and the identity of containers."""

import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dreplica.state.plain_state import PlainState


class Owner:
    """Something with attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__ |= attributes


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, 1), (True, False), (3, 4), (0.1, 0.2), (1j, 2j), ("a", "b"), (b"a", b"b"), ((1, 2), (1, 3))],
)
def test_restore_rebinds_value(before: Any, after: Any) -> None:
    owner = Owner(value=before)
    state = PlainState([owner])
    owner.value = after
    state.restore()
    assert owner.value is before


def test_restore_removes_new_and_returns_old_attributes() -> None:
    owner = Owner(a=1, b=2, c=3)
    state = PlainState([owner])
    del owner.b
    owner.d = 4
    state.restore()
    assert list(vars(owner).items()) == [("a", 1), ("b", 2), ("c", 3)]


CONTAINERS: list[tuple[Any, Callable[[Any], Any]]] = [
    ([1, 2], lambda held: held.append(3)),
    ([1, 2], lambda held: held.__setitem__(0, 3)),
    ({"a": 1}, lambda held: held.update(a=2, b=3)),
    ({"a": 1, "b": 2}, lambda held: held.pop("a")),
    (OrderedDict(a=1, b=2), lambda held: held.move_to_end("a")),
    (defaultdict(int, a=1), lambda held: held["b"]),
    (Counter("aab"), lambda held: held.update("ab")),
    ({1, 2}, lambda held: held.add(3)),
    (deque([1, 2], maxlen=2), lambda held: held.append(3)),
    ([[1], {"a": [2]}], lambda held: (held[0].clear(), held[1]["a"].append(3))),
    (([1], [2]), lambda held: held[1].append(3)),
]


@pytest.mark.parametrize(("held", "change"), CONTAINERS)
@pytest.mark.parametrize("rebound", [False, True])
def test_restore_containers_in_place(held: Any, change: Callable[[Any], Any], rebound: bool) -> None:
    owner = Owner(held=held)
    before = repr(held)
    state = PlainState([owner])
    for _ in range(2):
        change(held)
        assert repr(held) != before
        if rebound:
            owner.held = None
        state.restore()
        assert owner.held is held
        assert repr(held) == before


def test_restore_keeps_shared_and_cyclic_references() -> None:
    shared: list[Any] = [1]
    shared.append(shared)
    owner = Owner(one=shared, other={"shared": shared})
    state = PlainState([owner])
    owner.one, owner.other["shared"] = [2], [3]
    shared.clear()
    state.restore()
    assert owner.one is owner.other["shared"] is shared
    assert shared[0] == 1
    assert shared[1] is shared


@pytest.mark.parametrize(
    "generator",
    [random.Random(1), numpy.random.default_rng(1), numpy.random.RandomState(1), torch.Generator().manual_seed(1)],
    ids=lambda generator: type(generator).__name__,
)
def test_restore_generators(generator: Any) -> None:
    draws: dict[type, Callable[[Any], Any]] = {
        random.Random: lambda g: [g.gauss(0, 1), g.random()],
        numpy.random.Generator: lambda g: g.standard_normal(3).tolist(),
        numpy.random.RandomState: lambda g: g.normal(size=3).tolist(),
        torch.Generator: lambda g: torch.randn(3, generator=g).tolist(),
    }
    draw = draws[type(generator)]
    owner = Owner(generators=[generator])
    state = PlainState([owner])
    drawn = draw(generator)
    assert draw(generator) != drawn
    for _ in range(2):
        state.restore()
        assert owner.generators[0] is generator
        assert draw(generator) == drawn


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([float("nan"), -0.0, 1.0]),
        torch.arange(6).reshape(2, 3).t(),
        torch.ones(1).expand(3),
        torch.ones(2, dtype=torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.uint16),
        torch.ones(2, requires_grad=True),
        torch.zeros(0),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["in place", "rebound", "elsewhere", "resized"])
def test_restore_tensors_in_same_memory(tensor: Tensor, how: str) -> None:
    tensor = tensor.detach().requires_grad_(tensor.requires_grad)
    before, memory, stride = bytes_of(tensor), tensor.data_ptr(), tensor.stride()
    owner = Owner(tensor=tensor, view=tensor.detach()[:1])
    state = PlainState([owner])
    for _ in range(2):
        with torch.no_grad():
            if how == "in place":
                tensor.as_strided((tensor.numel() and 1,), (1,)).fill_(3)
            elif how == "rebound":
                owner.tensor = torch.zeros(9)
            elif how == "elsewhere":
                tensor.data = torch.zeros(7, dtype=tensor.dtype)
            elif tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.requires_grad:
                tensor.resize_(50)
        state.restore()
        assert owner.tensor is tensor
        assert bytes_of(tensor) == before
        assert tensor.stride() == stride
        if how != "resized":
            assert tensor.data_ptr() == memory
            assert owner.view.data_ptr() == memory


def test_restore_requires_grad() -> None:
    owner = Owner(tensor=torch.ones(2, requires_grad=True))
    state = PlainState([owner])
    owner.tensor.requires_grad_(False)
    state.restore()
    assert owner.tensor.requires_grad


def test_restore_sparse_tensors() -> None:
    owner = Owner(tensor=torch.eye(3).to_sparse())
    state = PlainState([owner])
    owner.tensor.copy_(torch.ones(3, 3).to_sparse())
    state.restore()
    assert owner.tensor.to_dense().equal(torch.eye(3))


def test_restore_autograd_result_without_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    made = weight * 2
    owner = Owner(hidden=made, pair=(made, [made]), view=None)
    state = PlainState([owner])
    for _ in range(2):
        owner.hidden = owner.pair = None
        state.restore()
        assert owner.hidden.grad_fn is None
        assert owner.hidden.tolist() == [2.0, 2.0]
        assert owner.hidden is owner.pair[0] is owner.pair[1][0]
        owner.hidden.zero_()


def test_restore_arrays_in_place() -> None:
    array, constant = numpy.arange(3.0), numpy.arange(2)
    constant.flags.writeable = False
    owner = Owner(array=array, constant=constant)
    state = PlainState([owner])
    array[1] = 9.0
    owner.array = owner.constant = None
    state.restore()
    assert owner.array is array
    assert owner.constant is constant
    assert array.tolist() == [0.0, 1.0, 2.0]


def test_unsupported_types_are_not_copied() -> None:
    lock, parameter, module = threading.Lock(), nn.Parameter(torch.ones(2)), nn.Linear(2, 2)
    with torch.inference_mode():
        made_in_inference = torch.ones(2)
    with open(__file__) as file:
        held = {
            "lock": lock,
            "file": file,
            "class": Owner,
            "function": partial(print),
            "module": module,
            "parameter": parameter,
            "meta": torch.ones(2, device="meta"),
            "inference": made_in_inference,
            "iterator": iter([1]),
            "objects": numpy.array([lock, None], dtype=object),
            "lambda": lambda: None,
        }
        owner = Owner(**held, many=list(held.values()))
        with lock:
            state = PlainState([owner])
            with torch.no_grad():
                parameter.zero_()
                module.weight.zero_()
            owner.many, owner.file = [], None
            state.restore()
            assert lock.locked()
        file.readline()
        state.restore()
        assert file.tell() > 0
    assert all(vars(owner)[name] is value for name, value in held.items())
    assert all(one is other for one, other in zip(owner.many, held.values(), strict=True))
    assert not parameter.any()
    assert not module.weight.any()


def test_enter_and_max_bytes_limit_copies() -> None:
    inner = Owner(count=1)
    owner = Owner(inner=inner, small=torch.zeros(2), large=torch.zeros(100), array=numpy.zeros(100))
    alone, entering = (
        PlainState([owner], enter=lambda value, kind=kind: isinstance(value, kind), max_bytes=100)
        for kind in (int, Owner)
    )
    inner.count = 2
    for value in (owner.small, owner.large, owner.array):
        value[0] = 1
    alone.restore()
    assert (inner.count, float(owner.small[0]), float(owner.large[0]), owner.array[0]) == (2, 0.0, 1.0, 1.0)
    entering.restore()
    assert inner.count == 1


def test_deep_nesting_is_supported() -> None:
    nested: list[Any] = []
    innermost = nested
    for _ in range(10000):
        innermost.append([])
        innermost = innermost[0]
    owner = Owner(nested=nested)
    state = PlainState([owner])
    innermost.append(1)
    state.restore()
    assert innermost == []
