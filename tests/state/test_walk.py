"""One enumeration of a replica's state for snapshots, checkpoints and shared state."""

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dreplica.state.replica import Replica
from dreplica.state.walk import StateWalk, generators_of
from tests.fixtures import tiny_model


def sgd(*parameters: torch.Tensor, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters or [torch.zeros(1, requires_grad=True)], lr=0.1, **settings)


def replica_of(model: nn.Module, criterion: nn.Module | None = None) -> Replica:
    criterion = criterion or nn.CrossEntropyLoss()
    return Replica(model, criterion, sgd(*model.parameters(), *criterion.parameters(), momentum=0.9))


def test_walk_lists_modules_of_model_and_criterion() -> None:
    replica = replica_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    walk = StateWalk(replica)
    assert list(walk.modules) == ["model", "model.0", "model.1", "criterion"]
    assert list(walk.owners) == [*walk.modules, "optimizer"]
    assert walk.owners["optimizer"] is replica.optimizer


def test_walk_names_all_tensors() -> None:
    criterion = nn.Linear(1, 1, bias=False)
    criterion.register_buffer("seen", torch.zeros(1), persistent=False)
    replica = replica_of(nn.Linear(2, 2), criterion)
    sum(parameter.sum() for parameter in (*replica.model.parameters(), *criterion.parameters())).backward()
    replica.optimizer.step()
    assert list(StateWalk(replica).tensors()) == [
        "model.weight",
        "model.bias",
        "criterion.weight",
        "criterion.seen",
        "optimizer.weight.momentum_buffer",
        "optimizer.bias.momentum_buffer",
        "optimizer.group0.params.2.momentum_buffer",
    ]
    assert list(StateWalk(replica).parameters()) == ["model.weight", "model.bias", "criterion.weight"]


def test_walk_names_tensors_of_several_optimizers() -> None:
    model = nn.ModuleDict({"gan": nn.Linear(1, 1), "critic": nn.Linear(1, 1)})
    optimizers = {name: torch.optim.Adam(each.parameters()) for name, each in model.items()}
    parts: Any = SimpleNamespace(model=model, criterion=nn.Module(), optimizers=optimizers, others=[], steps_done=0)
    model["critic"](torch.ones(1)).backward()
    optimizers["critic"].step()
    walk = StateWalk(parts)
    assert list(walk.optimizers) == ["optimizer.gan", "optimizer.critic"]
    assert [name for name in walk.tensors() if name.startswith("optimizer.")] == [
        f"optimizer.critic.{tensor}.{key}" for tensor in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    ]


def test_walk_finds_optimizers_held_by_others() -> None:
    replica = replica_of(nn.Linear(2, 2))
    base, first, second, deep, of_module = (sgd() for _ in range(5))
    replica.optimizer.base = base
    replica.optimizer.parts = [first, {"second": (second, base)}]
    first.inner = deque([deep])
    replica.model.tuner = of_module
    replica.model.again = replica.optimizer
    assert StateWalk(replica).optimizers == {
        "optimizer": replica.optimizer,
        "optimizer.base": base,
        "optimizer.parts.0": first,
        "optimizer.parts.1.second.0": second,
        "model.tuner": of_module,
        "optimizer.parts.0.inner.0": deep,
    }


def test_walk_ignores_cycles_and_deep_nesting() -> None:
    replica = replica_of(nn.Linear(2, 2))
    nested: list[Any] = []
    replica.model.nested = nested
    for _ in range(10000):
        nested.append([nested])
        nested = nested[-1]
    nested.append(replica.optimizer)
    assert list(StateWalk(replica).optimizers) == ["optimizer"]


def test_generators_of_searches_containers() -> None:
    model = tiny_model(5)
    one, two, three = random.Random(1), torch.Generator(), random.Random(3)
    model.noise, model.noises = one, {"cpu": [two], torch.zeros(1): three}
    assert generators_of(model) == {"noise": one, "noises.cpu.0": two, "noises.1": three}
    assert generators_of(nn.Linear(1, 1)) == {}


def test_walk_lists_scalers_and_state_objects() -> None:
    replica = replica_of(nn.Linear(2, 2))
    replica.scaler = torch.amp.GradScaler("cpu")
    preconditioner = object()
    replica.optimizer.state[replica.model.weight]["preconditioner"] = preconditioner
    walk = StateWalk(replica)
    assert walk.scalers == walk.others == [replica.scaler]
    assert walk.state_objects == [preconditioner]
