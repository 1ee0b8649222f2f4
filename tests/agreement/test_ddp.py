"""Ranks of one DistributedDataParallel model: shared stages are compared, and drift is found where it begins."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.process_group import World
from tests.agreement.bodies import flip_bit, seed_everything
from tests.harness import run_replicas
from tests.messages import data_of

STEPS = 4


class Net(nn.Module):
    """A model from (batch, 1, 4, 4) to (batch, 3) that clamps its temperature at step 3 on the rank `here`."""

    def __init__(self, here: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.temperature = nn.Parameter(torch.ones(()))
        self.here, self.calls = here, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.here and self.calls == 3:
            self.temperature.data.clamp_(max=0.5)
        return self.head(self.body(inputs)) / self.temperature


@dataclass(frozen=True)
class Loop:
    """A training loop with a fault on rank 1."""

    drift: Callable[[int, Net, torch.optim.Optimizer], Any] = lambda step, net, optimizer: None
    """Called with step, model and optimizer after each comparison, to change the next step."""
    rank_dependent_if: bool = False
    ddp: Any = None
    """Further arguments of DistributedDataParallel."""
    flips_at: int = 0
    num_micro_batches: int = 1
    syncs: bool = True
    """True if the last micro-batch's backward pass is outside `no_sync`."""
    arguments: Any = None
    """Further arguments of Agreement."""


def _toggle(step: int, net: Net, optimizer: torch.optim.Optimizer) -> None:
    if step == 1:
        net.head.weight.requires_grad_(False)


def _warm_up(step: int, net: Net, optimizer: torch.optim.Optimizer) -> None:
    if step == 2:
        optimizer.param_groups[0]["lr"] = 0.01


LOOPS: dict[str, tuple[Loop, tuple[int, str, str] | None]] = {
    "clean": (Loop(), None),
    "clean, micro-batches": (Loop(num_micro_batches=3), None),
    "clean, own statistics": (
        Loop(ddp={"broadcast_buffers": False}, arguments={"stages": ("gradients", "optimizer", "weights")}),
        None,
    ),
    "one bit": (Loop(flips_at=2), (2, "weights", "head.bias")),
    "buffers": (Loop(ddp={"broadcast_buffers": False}), (1, "buffers", "body.1.running_mean")),
    "requires_grad": (
        Loop(_toggle, ddp={"find_unused_parameters": True}),
        (2, "gradients", "head.weight"),
    ),
    "if in forward": (Loop(rank_dependent_if=True), (3, "weights", "temperature")),
    "learning rate": (Loop(_warm_up), (3, "optimizer", "group0.lr")),
    "no_sync": (Loop(num_micro_batches=2, syncs=False), (1, "gradients", "head.bias")),
}


def _train(world: World, loop: Loop) -> tuple[Verdict | None, int]:
    """Train with a different batch, random numbers and BatchNorm statistics on each rank."""
    odd = world.replica_id == 1
    seed_everything(0)
    net = Net(here=odd and loop.rank_dependent_if)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of arguments older releases have
        model = DistributedDataParallel(net, **(loop.ddp or {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seed_everything(world.replica_id)
    agreement = Agreement(model, optimizer, on_divergence="continue", **(loop.arguments or {}))
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        batches = [(torch.randn(4, 1, 4, 4), torch.randint(3, (4,))) for _ in range(loop.num_micro_batches)]
        for number, (inputs, labels) in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last and loop.syncs else model.no_sync():
                loss = nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
        optimizer.step()
        if odd and step == loop.flips_at:
            flip_bit(net.head.bias)
        agreement.step(batch=batches, loss=loss)
        if odd:
            loop.drift(step, net, optimizer)
    agreement.finish()
    return agreement.divergence, agreement.steps_checked


REMEDIES = {
    "one bit": "ddp-write-alike",
    "buffers": "ddp-broadcast-buffers",
    "requires_grad": "ddp-freeze-alike",
    "if in forward": "ddp-write-alike",
    "learning rate": "set-value-alike",
    "no_sync": "ddp-sync-last-backward",
}
"""The first remedy of each loop's divergence."""


def _train_all(world: World) -> dict[str, tuple[Verdict | None, int]]:
    return {name: _train(world, loop) for name, (loop, _) in LOOPS.items()}


def test_ddp_drift_is_found_at_first_step_and_tensor() -> None:
    results = run_replicas(_train_all, 3)
    assert isinstance(results[0], dict), results
    assert results[0] == results[1] == results[2]
    for name, (_, expected) in LOOPS.items():
        verdict, steps_checked = results[0][name]
        assert steps_checked == STEPS, name
        if expected is None:
            assert verdict is None, (name, verdict)
            continue
        assert verdict is not None, name
        assert (verdict.step, verdict.stage, verdict.tensor) == expected, name
        assert verdict.remedy[0].code == REMEDIES[name], (name, verdict)
        if name not in ("buffers", "no_sync"):  # in which every rank has its own
            assert verdict.suspects == [1], name
    frozen = results[0]["requires_grad"][0]
    assert frozen.cause == "structure-differs"
    assert data_of(frozen.evidence, "entries-missing")["entries"]["head.weight (requires_grad=False)"] == [1]
