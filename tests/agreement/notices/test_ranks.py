"""Warnings about batches and dropout that ranks of one data-parallel model share."""

import logging
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dreplica import Agreement
from dreplica.distributed.process_group import World
from tests.harness import run_replicas

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("notices-of-ranks")]


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.texts.append(record.getMessage())


def train(
    world: World,
    *,
    data: str = "own",
    given: str = "batch",
    dropout: float = 0.0,
    seed: str = "own",
    bad_rank: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Train a model on all ranks, and return the warnings and what was logged.

    Args:
        world: The ranks.
        data: "own" part of the data on each rank, "same" on all, "pairs" with two ranks each, or "first" the same in
            the first step only.
        given: What `step` is given: "batch", "loss", "object" (a batch that cannot be hashed) or "nothing".
        dropout: Probability of dropout.
        seed: "own" of each rank after the build, or "same".
        bad_rank: The rank whose loss is NaN at step 4.
        **arguments: Arguments of `Agreement`.
    """
    records, rank = Records(), world.replica_id
    logging.getLogger("dreplica").addHandler(records)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Dropout(dropout), nn.Linear(16, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(1 + (rank if seed == "own" else 0))
    agreement = Agreement(model, optimizer, **arguments)
    for step in range(1, 9):
        part = {"own": rank, "same": 0, "pairs": rank // 2, "first": 0 if step == 1 else rank}[data]
        generator = torch.Generator().manual_seed(100 * step + part)
        inputs, labels = torch.randn(4, 8, generator=generator), torch.randint(3, (4,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        reported = loss * torch.nan if rank == bad_rank and step >= 4 else loss
        passed: dict[str, Any] = {"batch": {"batch": (inputs, labels)}, "object": {"batch": [object()]}}.get(given, {})
        agreement.step(**passed, **({} if given == "nothing" else {"loss": reported}))
    line = agreement.finish().summary
    agreement.close()
    logging.getLogger("dreplica").removeHandler(records)
    found = [(each.code, each.data) for each in agreement.warnings]
    return {"found": found, "logged": records.texts, "texts": [each.text for each in agreement.warnings], "line": line}


RUNS: dict[str, dict[str, Any]] = {
    "clean": {},
    "clean with dropout": {"dropout": 0.5},
    "same batches": {"data": "same"},
    "same batches, lag": {"data": "same", "lag": 1},
    "same batches, every": {"data": "same", "every": 2},
    "same batches, lag and every": {"data": "same", "every": 2, "lag": 1},
    "same batches in pairs": {"data": "pairs"},
    "same first batch": {"data": "first"},
    "same batches by loss": {"data": "same", "given": "loss"},
    "same batches, not hashable": {"data": "same", "given": "object"},
    "same batches, unknown": {"data": "same", "given": "nothing"},
    "same dropout": {"dropout": 0.5, "seed": "same"},
    "same generator, no dropout": {"seed": "same"},
    "loss of one rank": {"bad_rank": 2},
    "no comparison": {"data": "same", "every": 0},
}


def body(world: World) -> dict[str, Any]:
    return {name: train(world, **arguments) for name, arguments in RUNS.items()}


@cache
def results() -> list[dict[str, Any]]:
    rows = run_replicas(body, 4, timeout=120.0)
    assert isinstance(rows[0], dict), rows[0]
    return rows


def found(name: str) -> list[tuple[str, Any]]:
    """Return the warnings of a run, which are the same on all ranks and logged on rank 0 only."""
    rows = [row[name] for row in results()]
    assert all(row["found"] == rows[0]["found"] and row["texts"] == rows[0]["texts"] for row in rows)
    assert rows[0]["logged"] == rows[0]["texts"]
    assert not any(row["logged"] for row in rows[1:])
    result: list[tuple[str, Any]] = rows[0]["found"]
    return result


@pytest.mark.parametrize(
    "name",
    ["clean", "clean with dropout", "same first batch", "same generator, no dropout", "same batches, unknown"],
)
def test_ranks_that_differ_give_no_warning(name: str) -> None:
    assert found(name) == []
    assert "warning" not in results()[0][name]["line"]


@pytest.mark.parametrize(
    ("name", "ranks", "steps"),
    [
        ("same batches", [0, 1, 2, 3], "1 and 2"),
        ("same batches, lag", [0, 1, 2, 3], "1 and 2"),
        ("same batches, every", [0, 1, 2, 3], "2 and 4"),
        ("same batches, lag and every", [0, 1, 2, 3], "2 and 4"),
        ("same batches in pairs", [0, 1], "1 and 2"),
    ],
)
def test_same_batches_are_named(name: str, ranks: list[int], steps: str) -> None:
    ((code, data),) = found(name)
    assert (code, data["ranks"], data["steps"]) == ("batches-identical", ranks, steps)
    assert "set_epoch" in results()[0][name]["texts"][0]
    assert results()[0][name]["line"].endswith("; 1 warning")


@pytest.mark.parametrize("name", ["same batches by loss", "same batches, not hashable"])
def test_same_losses_stand_for_batches(name: str) -> None:
    ((code, data),) = found(name)
    assert (code, data["ranks"]) == ("losses-identical", [0, 1, 2, 3])


def test_same_dropout_is_named() -> None:
    ((code, data),) = found("same dropout")
    assert (code, data["ranks"], data["module"], data["kind"]) == ("dropout-identical", [0, 1, 2, 3], "1", "Dropout")
    assert "torch.manual_seed(seed + rank)" in results()[0]["same dropout"]["texts"][0]


def test_warning_of_another_rank_is_logged_at_finish() -> None:
    ((code, data),) = found("loss of one rank")
    assert (code, data["step"]) == ("loss-not-finite", 4)
    assert results()[0]["loss of one rank"]["texts"][0].startswith("rank 2: the loss is NaN")


def test_nothing_is_looked_for_without_comparisons() -> None:
    assert found("no comparison") == []
