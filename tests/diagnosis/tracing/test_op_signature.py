"""What of an operator's arguments and results says anything."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dreplica.diagnosis.tracing import op_signature as tables
from dreplica.diagnosis.tracing.op_signature import signature_of, tensors_in

aten = torch.ops.aten


def test_in_place_operators_read_and_write() -> None:
    signature = signature_of(aten.add_.Tensor)
    one, other = torch.ones(2), torch.ones(2)
    assert signature.name == "aten.add_.Tensor"
    assert same(signature.inputs((one, other), {}), [one, other])
    assert same(signature.outputs(one, (one, other), {}), [one])
    assert not signature.is_view
    assert not signature.draws


def test_overwritten_arguments_are_not_inputs() -> None:
    into, source = torch.empty(2), torch.ones(2)
    assert same(signature_of(aten.copy_.default).inputs((into, source), {}), [source])
    assert same(signature_of(aten.copy_.default).outputs(into, (into, source), {}), [into])
    assert same(signature_of(aten.zero_.default).inputs((into,), {}), [])
    assert same(signature_of(aten.mul_.Tensor).inputs((into, source), {}), [into, source])


def test_out_argument_is_written_not_read() -> None:
    one, other, out = torch.ones(2), torch.ones(2), torch.empty(2)
    signature = signature_of(aten.add.out)
    assert same(signature.inputs((one, other), {"out": out}), [one, other])
    assert same(signature.outputs(out, (one, other), {"out": out}), [out])


def test_tensor_lists_count_individually() -> None:
    group, others = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]
    signature = signature_of(aten._foreach_add_.List)
    assert same(signature.inputs((group, others), {}), [*group, *others])
    assert same(signature.outputs(None, (group, others), {}), group)


def test_batch_norm_statistics_are_outputs() -> None:
    signature = signature_of(aten.native_batch_norm.default)
    images, weight, bias = torch.randn(4, 2), torch.ones(2), torch.zeros(2)
    mean, variance = torch.zeros(2), torch.ones(2)
    args = (images, weight, bias, mean, variance, True, 0.1, 1e-5)
    result = aten.native_batch_norm.default(*args)
    assert mean.any()
    outputs = signature.outputs(result, args, {})
    assert any(tensor is mean for tensor in outputs)
    assert any(tensor is variance for tensor in outputs)
    assert same(signature.inputs(args, {}), [images, weight, bias, mean, variance])


@pytest.mark.parametrize(
    ("op", "recorded"),
    [(aten.empty.memory_format, False), (aten.empty_like.default, False), (aten.zeros.default, True)],
)
def test_uninitialized_results_are_not_recorded(op: Any, recorded: bool) -> None:
    assert signature_of(op).recorded is recorded


@pytest.mark.parametrize(
    ("op", "is_view", "shows_part"),
    [
        (aten.t.default, True, True),
        (aten.select.int, True, True),
        (aten.detach.default, True, False),
        (aten.alias.default, True, False),
        (aten.relu.default, False, False),
        (aten.relu_.default, False, False),
        (aten.clone.default, False, False),
    ],
)
def test_views_are_marked(op: Any, is_view: bool, shows_part: bool) -> None:
    signature = signature_of(op)
    assert (signature.is_view, signature.shows_part) == (is_view, shows_part)


@pytest.mark.parametrize(
    ("op", "draws"),
    [
        (aten.bernoulli_.float, True),
        (aten.native_dropout.default, True),
        (aten.randn.generator, True),
        (aten.randperm.default, True),
        (aten.mul.Tensor, False),
        (aten.sort.default, False),
    ],
)
def test_drawing_operators_are_marked(op: Any, draws: bool) -> None:
    assert signature_of(op).draws is draws


@pytest.mark.parametrize(
    ("op", "kept"),
    [(aten._ctc_loss.default, [0]), (aten.mkldnn_rnn_layer.default, [0, 1, 2]), (aten.sort.default, [0, 1])],
)
def test_scratch_results_are_left_out_by_position(op: Any, kept: list[int]) -> None:
    results = [torch.ones(1) * number for number in range(len(op._schema.returns))]
    assert same(signature_of(op).outputs(results, (), {}), [results[number] for number in kept])


def test_tables_name_existing_operators() -> None:
    for packet, names in {**tables._SCRATCH_ARGUMENTS, **tables._UNDECLARED_WRITES}.items():
        op = getattr(aten, packet.removeprefix("aten."))
        arguments = {a.name for overload in op.overloads() for a in getattr(op, overload)._schema.arguments}
        assert names <= arguments, packet
    for packet in [*tables._UNINITIALIZED, *tables._OVERWRITES]:
        assert hasattr(aten, packet.removeprefix("aten.")), packet
    for packet, positions in tables._SCRATCH_RESULTS.items():
        op = getattr(aten, packet.removeprefix("aten."))
        assert max(positions) < len(op.default._schema.returns), packet
    for name in tables._SAME_VIEWS:
        assert signature_of(getattr(getattr(aten, name.split(".")[1]), name.split(".")[2])).is_view


def test_tensors_in_keeps_order() -> None:
    one, two, three = (torch.ones(1) * i for i in range(3))
    assert same(tensors_in([one, (2, "x", [two]), {"k": three}, None]), [one, two, three])


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """By identity."""
    return [id(tensor) for tensor in found] == [id(tensor) for tensor in expected]
