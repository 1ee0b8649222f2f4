"""A training loop of a user's own, on one process or several, with a mistake on request."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dreplica
from dreplica.distributed.process_group import World

STEPS = 5


def train(mistake: str | None = None, rank: int = 0, steps_done: int = 0, **arguments: Any) -> dreplica.Agreement:
    """Train and return the Agreement, before `finish`.

    Args:
        mistake: What goes wrong at step 3 on the odd ranks, or None.
        rank: This process's rank.
        steps_done: Number of steps to take without comparing them.
        **arguments: Arguments of `Agreement`.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(STEPS)]
    random.seed(0 if mistake != "unseeded" else rank)
    agreement: dreplica.Agreement | None = None
    for number, (inputs, labels) in enumerate(batches):
        if number == steps_done:
            agreement = dreplica.Agreement(model, optimizer, steps_done=steps_done, **arguments)
        wrong = number == 2 and rank % 2 == 1
        if mistake in ("augment", "unseeded") and number >= 2:
            inputs = inputs * random.random()
        if wrong and mistake in MISTAKES:
            MISTAKES[mistake](model, optimizer)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if agreement is not None:
            agreement.step(batch=(inputs, labels), loss=loss)
    assert agreement is not None
    return agreement


def _set_lr(_: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.5


def _draw(*_: Any) -> None:
    random.random()


def _move_weights(model: nn.Module, _: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3


MISTAKES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "lr": _set_lr,
    "draw": _draw,
    "weights": _move_weights,
}


def train_on_rank(world: World, mistake: str | None, arguments: Mapping[str, Any]) -> dreplica.Verdict | str:
    """Train on a rank of a process group, and return the verdict, or the text of a `Divergence`."""
    try:
        with train(mistake, world.replica_id, **arguments) as agreement:
            return agreement.finish()
    except dreplica.Divergence as divergence:
        return str(divergence)


def record(folder: Path, mistake: str | None = None, rank: int = 0, **arguments: Any) -> Path:
    """Record a run of one process into a new folder, and return the folder."""
    with train(mistake, rank, record=folder, **arguments) as agreement:
        agreement.finish()
    return folder
