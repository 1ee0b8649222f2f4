"""`Agreement.keep_state` copies the state that a step begins with, in memory that is allocated once."""

from typing import Any

import pytest
import torch
from torch import nn

import dreplica
from dreplica.agreement.kept_state import KeptStates
from dreplica.agreement.subject import Subject
from dreplica.distributed.process_group import World
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.state.snapshot import Snapshot, restore_snapshot
from tests.harness import run_replicas


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


class Loop:
    """A model with a buffer, an optimizer with state, and a custom step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(5, 4)).sum().backward()
        self.optimizer.step()
        self.scheduler.step()

    def state(self) -> Any:
        return (
            dreplica.fingerprint(self.model.state_dict()),
            dreplica.fingerprint({"rng": torch.get_rng_state()}),
            repr(self.optimizer.state_dict()),
            self.scheduler.last_epoch,
            [None if each.grad is None else each.grad.tolist() for each in self.model.parameters()],
            [module.training for module in self.model.modules()],
        )

    def agree(self, **arguments: Any) -> dreplica.Agreement:
        return dreplica.Agreement(self.model, self.optimizer, others=[self.scheduler], **arguments)


def memory_of(snapshot: Snapshot) -> dict[str, int]:
    kept = {name: each.values for name, each in snapshot.tensors.items()} | dict(snapshot.gradients)
    return {name: tensor.data_ptr() for name, tensor in kept.items() if tensor is not None}


def test_kept_states_reuse_memory_and_restore_exactly() -> None:
    loop = Loop()
    kept = KeptStates(Subject(loop.model, loop.optimizer, [loop.scheduler]), steps=1)
    memory: dict[str, int] = {}
    for number in range(1, 6):
        loop.model[2].train(number % 2 == 0)
        kept.keep(number)
        before = loop.state()
        snapshot = kept.before(number)
        assert snapshot is not None
        assert kept.before(number - 1) is None
        if number > 3:  # the optimizer has its state and the model its gradients since step 2
            assert memory_of(snapshot) == memory
        memory = memory_of(snapshot)
        loop.step()
        after = loop.state()
        assert before != after
        restore_snapshot(kept._parts, snapshot)
        assert loop.state() == before
        loop.step()
        assert loop.state() == after


def test_kept_states_follow_a_changed_shape() -> None:
    loop = Loop()
    kept = KeptStates(Subject(loop.model), steps=1)
    kept.keep(1)
    loop.model[1].running_mean = torch.ones(7)
    kept.keep(2)
    snapshot = kept.before(2)
    assert snapshot is not None
    assert snapshot.tensors["model.1.running_mean"].values.tolist() == [1.0] * 7


@pytest.mark.parametrize(
    ("arguments", "kept"), [({}, [5]), ({"lag": 1}, [4, 5]), ({"every": 3}, [3]), ({"every": 0}, [])]
)
def test_keep_state_keeps_steps_that_are_compared(arguments: dict[str, Any], kept: list[int]) -> None:
    loop = Loop()
    agreement = loop.agree(**arguments)
    for _ in range(5):
        agreement.keep_state()
        agreement.keep_state()  # twice is once
        loop.step()
        agreement.step()
    assert [number for number, _ in agreement._engine._kept._kept] == kept
    agreement.close()
    with pytest.raises(dreplica.DreplicaError, match="closed"):
        agreement.keep_state()


def _diverge(world: World, lag: Any) -> tuple[int | None, bool, bool]:
    """Diverge at step 2 of 5, and return its number, and whether the state before it is kept."""
    loop = Loop()
    agreement = loop.agree(lag=lag, on_divergence="continue")
    states = {}
    for number in range(1, 6):
        agreement.keep_state()
        states[number] = loop.state()
        loop.step()
        if number == 2 and world.replica_id == 1:
            loop.model[0].weight.data[0, 0] += 1
        agreement.step()
    agreement.finish()
    original = agreement.original
    assert original.found is not None
    if original.before is None:
        return original.found.step, False, False
    restore_snapshot(agreement._engine._kept._parts, original.before)
    return original.found.step, loop.state() == states[2], "weights" in original.stages


@pytest.mark.process
@pytest.mark.parametrize("lag", [0, 1])
def test_state_before_divergence_is_not_overwritten(lag: int) -> None:
    assert run_replicas(_diverge, 2, lag) == [(2, True, True)] * 2
