"""What differs at the first operator that differs, from records of real steps."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import OpDifference, difference_behind, first_difference
from dreplica.diagnosis.evidence.place import Side, findings_between
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer

X = torch.linspace(-1, 1, 12).reshape(3, 4)
Step = Callable[[int], Any]
"""A step of replica 0 or 1."""


def traced(step: Step, replica: int) -> list[OpRecord]:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    with OpTracer(generators=True, state=[X]) as tracer:
        step(replica)
    return tracer.records


def differences(step: Step) -> tuple[OpDifference, list[Finding]]:
    one, other = (traced(step, replica) for replica in (0, 1))
    place = first_difference(one, other)
    assert place is not None
    return place, findings_between(place, Side(one, "on replica 0"), Side(other, "on replica 1"))


def kinds(step: Step) -> list[Kind]:
    return [finding.kind for finding in differences(step)[1]]


HOST: dict[str, Step] = {
    "number": lambda r: X * (1 + r),
    "keyword": lambda r: torch.add(X, X, alpha=1 + r),
    "none_or_number": lambda r: X.clamp(min=None if r else 0.1, max=0.1 if r else None),
    "dimension": lambda r: X.sum(r),
    "flag": lambda r: X.sum(0, keepdim=bool(r)),
    "string": lambda r: nn.functional.gelu(X, approximate="tanh" if r else "none"),
    "size": lambda r: torch.ones(3 + r).sum(),
    "dtype": lambda r: X.to(torch.float64 if r else torch.float16),
    "selection": lambda r: X[:, r] * 2,
    "tensor_of_python": lambda r: X + torch.tensor(float(r)),
    "tensor_of_list": lambda r: X + torch.tensor([float(r)] * 4),
    "as_tensor_of_numpy": lambda r: X + torch.as_tensor(numpy.full(4, r, dtype=numpy.float32)),
    "from_numpy": lambda r: X + torch.from_numpy(numpy.full((3, 4), r, dtype=numpy.float32)),
    "full": lambda r: X + torch.full((4,), float(r)),
    "arange": lambda r: X + torch.arange(r, r + 4),
    "set_item": lambda r: X.clone().__setitem__(0, float(r)),
}


@pytest.mark.parametrize("step", HOST.values(), ids=HOST)
def test_host_value(step: Step) -> None:
    place, findings = differences(step)
    assert [finding.kind for finding in findings] == [Kind.OTHER_HOST_VALUE]
    line = findings[0].lines[0]
    assert place.one is not None
    assert place.other is not None
    assert line.data["values"] == [place.one.scalars, place.other.scalars]
    assert __file__ in line.text


def test_calls_of_other_lines_are_other_operators() -> None:
    """A branch multiplies once more: the calls that are compared are not the same one."""

    def step(replica: int) -> None:
        loss = X.sum()
        if replica:
            loss = loss * 1.05
        loss * 1.0

    _, findings = differences(step)
    assert [finding.kind for finding in findings] == [Kind.OTHER_OPERATORS]
    assert [line.code for line in findings[0].lines] == ["other-calls"]


def test_host_value_in_other_order_says_so() -> None:
    def step(replica: int) -> None:
        for factor in (2.0, 3.0, 4.0)[:: 1 - 2 * replica]:
            X * factor

    _, findings = differences(step)
    assert [finding.kind for finding in findings] == [Kind.OTHER_HOST_VALUE]
    assert [line.code for line in findings[0].lines] == ["host-value", "host-values-permuted"]


def test_number_of_a_tensor_is_no_host_value() -> None:
    """A number that Python reads from a tensor that differs leads to the tensor."""

    def step(replica: int) -> None:
        weights = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weights], lr=0.1)
        largest = (X * X.roll(replica)).max()
        weights.sum().backward()
        weights.grad *= 1 / largest.item()  # type: ignore[operator]
        optimizer.step()

    one, other = (traced(step, replica) for replica in (0, 1))
    place = difference_behind(one, other, "optimizer")
    assert place is not None
    assert place.record.name == "aten.roll.default"
    scaled = next(p for p in range(len(one)) if one[p].name == "aten.mul_.Tensor")
    later = OpDifference(scaled, one[scaled], other[scaled])
    assert findings_between(later, Side(one, ""), Side(other, "")) == []


DRAWS: dict[str, Step] = {
    "own_generator": lambda r: torch.rand(3, generator=torch.Generator().manual_seed(r)),
    "seeded_again": lambda r: (torch.manual_seed(r), nn.functional.dropout(X)),
    "drawn_in_vain": lambda r: ([torch.rand(1)] * r and torch.rand(2), nn.functional.dropout(X)),
}


@pytest.mark.parametrize("step", DRAWS.values(), ids=DRAWS)
def test_draw_from_other_state(step: Step) -> None:
    _, findings = differences(step)
    assert [finding.kind for finding in findings] == [Kind.OTHER_DRAW]
    first = next(line for line in findings[0].lines if line.code == "first-draws")
    assert all(__file__ in text or text == "none" for text in first.data["draws"])


def test_draw_that_both_sides_use_is_structure() -> None:
    def step(replica: int) -> Tensor:
        return X + torch.rand(3, 4) if replica else X + X.abs()

    assert kinds(step) == []


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand])
def test_host_draw_from_other_state(draw: Callable[[], float]) -> None:
    """The draw is named rather than the number."""
    one, other = ([*traced(lambda _: X * float(draw()), 0)] for _ in range(2))
    assert one == other
    moved = [OpRecord(r.name, r.module, r.phase, b"", b"", r.source, generator=b"z" * 16) for r in other[:1]]
    place = first_difference(one, [*moved, *other[1:]])
    assert place is not None
    (finding,) = findings_between(place, Side(one, ""), Side([*moved, *other[1:]], ""))
    assert finding.kind is Kind.OTHER_DRAW
    assert "was drawn from" in finding.lines[0].text


def test_unwritten_memory_is_named_with_its_allocation() -> None:
    """The same records as of two replicas whose allocators returned different contents."""

    def step(replica: int) -> Tensor:
        memory = torch.empty(3, 4)
        memory[:, :3] = X[:, :3]
        return memory * 2

    one, other = traced(step, 0), traced(step, 1)
    read = next(p for p, record in enumerate(one) if record.name == "aten.mul.Tensor")
    (left,) = one[read].unwritten
    assert (left.elements, left.total, left.allocator) == (3, 12, "aten.empty.memory_format")
    assert left.source.startswith(__file__)
    assert other[read].unwritten[0].rest == left.rest
    place = OpDifference(read, one[read], replace(one[read], inputs=b"z" * 16))
    (finding,) = findings_between(place, Side(one, ""), Side(one, ""))
    assert finding.kind is Kind.UNWRITTEN_MEMORY
    assert finding.lines[0].text.count(__file__) == 2


def test_unwritten_memory_beside_another_difference_is_not_named() -> None:
    def step(replica: int) -> Tensor:
        memory = torch.empty(3, 4)
        memory[:, :3] = X[:, :3]
        return memory * 2

    one = traced(step, 0)
    read = next(p for p, record in enumerate(one) if record.name == "aten.mul.Tensor")
    (left,) = one[read].unwritten
    changed = replace(one[read], inputs=b"z" * 16, unwritten=(replace(left, rest=b"y" * 16),))
    assert findings_between(OpDifference(read, one[read], changed), Side(one, ""), Side(one, "")) == []


def test_outside_input() -> None:
    codebook = [torch.ones(4), torch.zeros(4)]
    place, findings = differences(lambda r: X + codebook[r])
    assert [finding.kind for finding in findings] == [Kind.OUTSIDE_INPUT]
    assert place.record.name == "aten.add.Tensor"


def test_other_order_of_tensors() -> None:
    parts = [X * 2, X * 3]
    assert kinds(lambda r: torch.stack([part + 0 for part in parts][:: 1 - 2 * r])) == [Kind.OTHER_ORDER]


def test_other_tensor_of_the_step() -> None:
    def step(replica: int) -> Tensor:
        parts = [X * 2, X * 3]
        return parts[replica] + 1

    assert kinds(step) == [Kind.OTHER_TENSOR]


def test_operator_alone_has_no_finding_of_its_inputs() -> None:
    one = traced(lambda r: X * 2, 0)
    other = [replace(one[0], outputs=b"z" * 16)]
    place = first_difference(one, other)
    assert place is not None
    assert place.made_here
    assert findings_between(place, Side(one, ""), Side(other, "")) == []


def test_views_are_not_the_place() -> None:
    def step(replica: int) -> Tensor:
        x = X.detach().view(12) if replica else X.reshape(-1)
        return x * (1 + replica)

    assert differences(step)[0].record.name == "aten.mul.Tensor"


def test_recomputed_activation_is_not_the_place() -> None:
    def step(replica: int) -> Tensor:
        y = (X * 2).relu()
        if replica:
            (X * 2).relu()
        return y.exp() * (1 + replica)

    place, findings = differences(step)
    assert place.record.name == "aten.mul.Tensor"
    assert (place.position(False), place.position(True)) == (3, 5)
    assert [finding.kind for finding in findings] == [Kind.OTHER_HOST_VALUE]


def test_write_in_place_is_the_place_though_contents_are_known() -> None:
    def step(replica: int) -> Tensor:
        zeros, y = torch.zeros(3, 4), X * 2
        if replica:
            y.copy_(zeros)
        return y + 1

    assert differences(step)[0].record.name == "aten.copy_.default"
