"""check_wiring on sharded and wrapped models, on four processes: correct ones pass, stale optimizers are faults."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dreplica.agreement.wiring.fault import WiringError
from dreplica.distributed.process_group import World
from dreplica.replica.wiring import check_wiring
from tests.harness import run_replicas

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("sharded-wiring")]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def fsdp2(model: nn.Module, **arguments: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


def hsdp(model: nn.Module) -> nn.Module:
    return fsdp2(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, init_device_mesh("cpu", (4,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp1_original(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def tied(model: nn.Sequential) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    extended = nn.Sequential(*model, nn.Linear(5, 8), nn.Linear(8, 5, bias=False))
    extended[4].weight = model[2].weight
    return fully_shard(extended)  # tied weights must be in one group


def compiled_ddp(model: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(DistributedDataParallel(model))
    return compiled


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "fully_shard": fsdp2,
    "hsdp": hsdp,
    "tensor parallel": tensor_parallel,
    "FSDP": fsdp1,
    "FSDP, original parameters": fsdp1_original,
    "fully_shard, tied weights": tied,
    "compiled DDP": compiled_ddp,
}
REPLACING = ("fully_shard", "hsdp", "tensor parallel", "FSDP")
"""Wrappers that replace the parameters."""


def fault_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, Any, str] | None:
    try:
        check_wiring(model, optimizer)
    except WiringError as error:
        return error.code, error.fields.get("origin"), str(error)
    return None


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, 8)).sum().backward()
    optimizer.step()


def overlapping_shards() -> nn.Module:
    """Return a sharded model in which the shard of one parameter is the memory of another one's."""
    model = fsdp2(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)))
    one, other = (parameter._local_tensor for parameter in model.parameters())  # type: ignore[attr-defined]
    other.data = one.data
    return model


def body(world: World) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, wrap in WRAPPERS.items():
        model = wrap(net())
        optimizer = sgd(model)
        results[name, "new"] = fault_of(model, optimizer)
        if name != "compiled DDP":
            train(model, optimizer)
            results[name, "trained"] = fault_of(model, optimizer)
            with torch.no_grad():
                model(torch.ones(3, 8))
            results[name, "evaluated"] = fault_of(model, optimizer)
    for name in REPLACING:
        bare = net()
        optimizer = sgd(bare)
        results[name, "stale"] = fault_of(WRAPPERS[name](bare), optimizer)
    results["another", "stale"] = fault_of(fsdp2(net()), sgd(nn.Linear(3, 3)))
    shards = overlapping_shards()
    results["shards", "overlap"] = fault_of(shards, sgd(shards))
    return results


@cache
def results() -> dict[Any, Any]:
    rows = run_replicas(body, 4, timeout=120.0)
    assert isinstance(rows[0], dict), rows[0]
    assert all(row == rows[0] for row in rows)
    return rows[0]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_model_passes(name: str) -> None:
    found = {when: fault for (wrapper, when), fault in results().items() if wrapper == name and when != "stale"}
    assert found
    assert not any(found.values()), found


@pytest.mark.parametrize("name", REPLACING)
def test_optimizer_made_before_sharding_is_named(name: str) -> None:
    code, origin, text = results()[name, "stale"]
    assert (code, origin) == ("optimizer-not-bound", "sharded")
    assert "made before the model was" in text


def test_sharded_model_with_unrelated_optimizer() -> None:
    assert results()["another", "stale"][:2] == ("optimizer-not-bound", "another-model")


def test_shards_in_one_memory_are_a_fault() -> None:
    assert results()["shards", "overlap"][0] == "storage-shared"


def test_overlap_is_judged_by_inner_tensors() -> None:
    """A wrapper's own address is 0 for every tensor."""
    from torch.testing._internal.two_tensor import TwoTensor

    def wrapped(one: Tensor, other: Tensor) -> nn.Module:
        model = nn.Module()
        model.a = nn.Parameter(TwoTensor(one, one.clone()))
        model.b = nn.Parameter(TwoTensor(other, other.clone()))
        return model

    check_wiring(wrapped(torch.ones(4), torch.ones(4)), None)
    shared = torch.ones(4)
    with pytest.raises(WiringError) as caught:
        check_wiring(wrapped(shared, shared), None)
    assert caught.value.code == "storage-shared"
