"""Distances between replicas, against hand-computed values."""

import math
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from dreplica.diagnosis.measurement.replica_distance import measure_distance
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.state.replica import Replica
from tests.harness import run_replicas


class Few(nn.Module):
    """Two weights and two buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor([1.0, 2.0, 0.0]))
        self.two = nn.Parameter(torch.tensor([[1.0], [4.0]], dtype=torch.float64))
        self.register_buffer("mean", torch.tensor([1.0, 1.0], dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(5))


def make_replica(momentum: float = 0.9) -> Replica:
    model = Few()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        model.one.copy_(torch.tensor([1.0, 2.0, 0.0]))
        model.two.copy_(torch.tensor([[1.0], [4.0]]))
    return Replica(model, nn.CrossEntropyLoss(), optimizer)


def measured(world: World, change: str) -> Any:
    replica = make_replica()
    model = replica.model
    with torch.no_grad():
        if world.replica_id == 1:
            if change == "steps":
                model.one[0] = float(numpy.float32(1.0) + 3 * numpy.spacing(numpy.float32(1.0)))
                model.two[1, 0] = math.nextafter(4.0, 5.0)
                model.mean[1] = 1.0 + 2 * 2.0**-7
                model.count += 1
            elif change == "three and four":
                model.one[0] += 3.0
                model.one[1] += 4.0
                replica.optimizer.state[model.two]["momentum_buffer"] += 2.0
            elif change == "sign of zero":
                model.one[2] = -0.0
            elif change == "nan":
                model.one[1] = float("nan")
                model.two[0] += 1.0
            elif change == "shape":
                model.mean = torch.zeros(3, dtype=torch.bfloat16)
        if world.replica_id == 2:
            model.one[1] += 1.0
    return measure_distance(replica, world.channel)


def test_distance_matches_hand_computed_values() -> None:
    rows = run_replicas(measured, 3, "steps")
    assert rows[0] == rows[1] == rows[2]
    row = rows[0]
    assert set(row) == {"weights", "buffers", "optimizer"}
    ulp = 3 * 2.0**-23
    assert row["weights"]["max_ulp"] == [0, 3, 2**22]  # from 2 to 3: half of the 2**23 numbers from 2 to 4
    assert row["weights"]["l2"] == [0.0, math.hypot(ulp, math.nextafter(4.0, 5.0) - 4.0), 1.0]
    assert row["buffers"] == {"max_ulp": [0, 2, 0], "l2": [0.0, 2.0**-6, 0.0]}  # the integer is not measured
    assert row["optimizer"] == {"max_ulp": [0, 0, 0], "l2": [0.0, 0.0, 0.0]}


def test_distance_norm_is_over_whole_stage() -> None:
    row = run_replicas(measured, 2, "three and four")[0]
    assert row["weights"]["l2"] == [0.0, 5.0]
    assert row["optimizer"]["l2"] == [0.0, math.sqrt(8.0)]  # two momenta, 2 apart each
    assert row["buffers"]["l2"] == [0.0, 0.0]


class Unusual(Few):
    """Buffers of unusual dtypes and layouts."""

    def __init__(self, replica_id: int) -> None:
        super().__init__()
        self.register_buffer("f8", torch.tensor([1.0 + replica_id]).to(torch.float8_e4m3fn))
        self.register_buffer("u16", torch.tensor([replica_id]).to(torch.uint16))
        self.register_buffer("packed", torch.tensor([replica_id], dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
        self.register_buffer("sparse", torch.diag(torch.tensor([0.0, 2.0 * replica_id])).to_sparse())


def measured_unusual(world: World) -> Any:
    model, criterion = Unusual(world.replica_id), Few()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    with torch.no_grad():
        criterion.one += 5.0 * world.replica_id
    return measure_distance(Replica(model, criterion, optimizer), world.channel)


def test_distance_of_any_dtype_and_layout() -> None:
    row = run_replicas(measured_unusual, 2)[0]
    assert row["buffers"]["l2"] == [0.0, math.hypot(1.0, 2.0)]
    assert row["weights"]["l2"] == [0.0, 0.0]
    assert row["optimizer"]["l2"] == [0.0, math.sqrt(75.0)]


def test_distance_ignores_sign_of_zero() -> None:
    row = run_replicas(measured, 2, "sign of zero")[0]
    assert row["weights"] == {"max_ulp": [0, 0], "l2": [0.0, 0.0]}


def test_distance_of_nan_is_none() -> None:
    row = run_replicas(measured, 2, "nan")[0]
    assert row["weights"]["max_ulp"] == [0, None]
    assert row["weights"]["l2"][0] == 0.0
    assert math.isnan(row["weights"]["l2"][1])


def test_distance_of_other_tensors_is_empty() -> None:
    assert run_replicas(measured, 2, "shape") == [{}, {}]


@pytest.mark.parametrize(
    ("momentum", "stages"), [(0.9, {"weights", "buffers", "optimizer"}), (0.0, {"weights", "buffers"})]
)
def test_distance_of_one_replica_is_zero(momentum: float, stages: set[str]) -> None:
    row = measure_distance(make_replica(momentum), Channel())
    assert row == {stage: {"max_ulp": [0], "l2": [0.0]} for stage in stages}


def test_measure_distance_keeps_weights() -> None:
    replica = make_replica()
    before = [tensor.detach().numpy().tobytes() for tensor in replica.model.parameters()]
    measure_distance(replica, Channel())
    assert [tensor.detach().numpy().tobytes() for tensor in replica.model.parameters()] == before
