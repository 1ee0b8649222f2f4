"""Layouts of a replica's state, without other replicas."""

import json

import torch
from torch import nn

from dreplica.agreement.subject import Subject
from dreplica.diagnosis.replay.replay_step import Repeated
from dreplica.diagnosis.replay.state_layout import Column, gather_layouts, layout_of
from dreplica.distributed.channel import Channel


def repeated() -> Repeated:
    models = {"a": nn.Linear(2, 3), "b": nn.BatchNorm1d(3)}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
    return Repeated(lambda _: None, torch.ones(4, 2), Subject(models, optimizers))


def test_layout_of_several_models() -> None:
    layout = layout_of(repeated().parts, {"x": torch.ones(4, 2), "y": 3})
    assert json.loads(json.dumps(layout)) == layout
    assert layout["objects"] == {"optimizer 'a'": "SGD", "optimizer 'b'": "SGD"}
    assert layout["tensors"]["a.weight"] == "parameter float32 (3, 2)"
    assert layout["tensors"]["b.num_batches_tracked"] == "int64 ()"
    assert layout["groups"]["b b.bias"] == "group 0 of the optimizer b"
    assert layout["order"]["group 0 of the optimizer a 1"] == "a.bias"
    assert layout["order"]["the model's buffers 0"] == "b.running_mean"
    assert layout["modes"]["the model"] == layout["modes"]["b"] == "training mode"
    assert layout["batch"] == {"x": "float32 (4, 2)", "y": "no tensor"}


def test_equal_layouts_have_no_difference() -> None:
    own = repeated()
    found = gather_layouts(own.parts, own.given, Channel())
    assert found.structure() is found.order is found.modes is found.batch is None


def test_column_groups_replicas_by_value() -> None:
    assert str(Column("a", ("x", None, "x"))) == "a: x on replicas 0, 2; missing on replica 1"


def test_entries_are_in_the_order_of_names_on_request() -> None:
    own = repeated()
    names = own.state()["weights"].names
    own.by_name = True
    ordered = own.state()["weights"]
    assert ordered.names == tuple(sorted(names))
    own.by_name = False
    assert ordered.entries() == own.state()["weights"].entries()
