"""`dreplica.diagnose` with a kept state compares the replays with the original step: what happened once is seen."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreplica
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.process_group import World
from dreplica.errors import SharedUsageError
from tests.diagnosis.test_diagnose_own_values import Loop
from tests.harness import run_replicas
from tests.messages import codes, texts


def flip(weight: Tensor) -> None:
    weight.data.view(torch.int32)[1, 2] ^= 1 << 22


def negate(weight: Tensor) -> None:
    with torch.no_grad():
        weight[1, 2].mul_(-1)


def clamp(weight: Tensor) -> None:
    weight.data.clamp_(-0.05, 0.05)


def draw(_: Tensor) -> None:
    torch.rand(3)


def clip(weight: Tensor) -> None:
    nn.utils.clip_grad_norm_([weight], 1e-3)


def flip_gradient(weight: Tensor) -> None:
    assert weight.grad is not None
    flip(weight.grad)


ONCE: dict[str, tuple[Callable[[Tensor], None], str]] = {
    "bit past PyTorch's operators": (flip, "transient-fault"),
    "bit by an operator": (negate, "unreplayed-state"),
    "many elements": (clamp, "unreplayed-state"),
    "draw": (draw, "generators-differ"),
    "gradients by an operator": (clip, "unreplayed-state"),
    "bit of a gradient": (flip_gradient, "transient-fault"),
}


def _happen_once(loop: Loop, action: Callable[[Tensor], None], keep: bool) -> Verdict:
    agreement = dreplica.Agreement(loop.model, loop.optimizer)
    for number in range(1, 6):
        batch = torch.randn(6, 8, generator=torch.Generator().manual_seed(number)), torch.arange(6) % 3
        if keep:
            agreement.keep_state()
        loss, logits = loop.step(batch)
        if loop.one and number == 3:
            action(loop.model.body[0].weight)
        try:
            agreement.step(batch=batch, loss=loss, outputs=logits)
        except dreplica.Divergence:
            return dreplica.diagnose(loop.step, batch, loop.model, loop.optimizer, agreement=agreement)
    raise AssertionError("no divergence")


def _run(world: World) -> dict[Any, Any]:
    torch.set_num_threads(1)
    one = world.replica_id == 1
    found: dict[Any, Any] = {
        (name, keep): _happen_once(Loop(one), action, keep)
        for name, (action, _) in ONCE.items()
        for keep in (True, False)
    }

    def leave(batch: Tensor) -> Tensor:
        if one:
            sys.exit(3)
        return batch.sum()

    found["exit"] = dreplica.diagnose(leave, torch.ones(3), nn.Linear(2, 2))
    agreement = dreplica.Agreement(Loop(one).model)
    try:
        dreplica.diagnose(leave, torch.ones(3), nn.Linear(2, 2), agreement=agreement)
    except SharedUsageError as error:
        found["other model"] = str(error)
    return found


@pytest.fixture(scope="module")
def verdicts() -> dict[Any, Any]:
    one, two = run_replicas(_run, 2, timeout=120.0)
    assert isinstance(one, dict), one
    assert one == two
    return one


@pytest.mark.process
@pytest.mark.parametrize("name", list(ONCE))
def test_what_happened_once_is_compared_with_the_original(name: str, verdicts: dict[Any, Any]) -> None:
    verdict = verdicts[name, True]
    assert (verdict.cause, verdict.suspects, verdict.step) == (ONCE[name][1], [1], 3)
    assert "original-differs" in codes(verdict.evidence)


@pytest.mark.process
@pytest.mark.parametrize("name", list(ONCE))
def test_without_kept_state_nothing_is_acquitted(name: str, verdicts: dict[Any, Any]) -> None:
    verdict = verdicts[name, False]
    if name == "draw":  # the present generators differ, and nothing else
        assert verdict.cause == "generators-differ"
        return
    assert (verdict.cause, verdict.suspects) == ("unexplained", [])
    agrees = "step-agrees-own" if "gradient" in name else "step-agrees-equalised"  # gradients are made anew
    assert codes(verdict.evidence)[-1] == agrees
    assert codes(verdict.remedy) == ["keep-state"]


@pytest.mark.process
def test_step_that_exits_ends_in_one_message(verdicts: dict[Any, Any]) -> None:
    assert "replica 1 raised StepExit: the step function called sys.exit(3)" in texts(verdicts["exit"].evidence)[-1]


@pytest.mark.process
def test_other_model_than_that_of_the_agreement_is_refused(verdicts: dict[Any, Any]) -> None:
    assert "agreement compares another model" in verdicts["other model"]
