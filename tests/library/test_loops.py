"""Typical loops: an injected divergence is found at its step, stage and tensor, and clean loops agree.

The examples of docs/library.md print what the page says.
"""

import os
import tempfile
import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.distributed.process_group import World
from tests.harness import REPOSITORY, run_replicas
from tests.library.loops import LOOPS, STEP, Net
from tests.library.page import examples_of, run

pytestmark = pytest.mark.xdist_group("library")  # one worker, which starts the processes once

HEAVY = ("lightning.pytorch", "transformers.trainer", "accelerate")
PAGE = REPOSITORY / "docs" / "library.md"

PLANTED = {
    "mnist": ("gradients", "fc.weight"),
    "ddp": ("optimizer", "conv.bias.momentum_buffer"),
    "lightning": ("optimizer", "group0.lr"),
    "transformers": ("weights", "net.fc.weight"),
}
HELD = {"lightning", "transformers"}
"""Loops whose callback keeps the state before each step."""
SIZE = 4 * sum(parameter.numel() for parameter in Net().parameters())
"""Bytes of the weights, and of the gradients."""
READ = {
    "ddp": 3 * SIZE,  # weights, gradients and momentum
    "lightning": 3 * SIZE,
    "transformers": 4 * SIZE + 4 * len(list(Net().parameters())),  # AdamW's two moments, and a step for each tensor
}


def _run_loops(world: World) -> dict[tuple[str, bool], Any]:
    """Return each loop's verdict, or its steps compared and the bytes read in the last step."""
    results: dict[tuple[str, bool], Any] = {}
    for name, loop in LOOPS.items():
        for planted in (False, True):
            try:
                agreement = loop(planted and world.replica_id == 1)
                results[name, planted] = agreement.steps_checked, agreement.bytes_per_step
                _check_kept_state(name, agreement)
            except Divergence as divergence:
                results[name, planted] = divergence.verdict
    return results


def _check_kept_state(name: str, agreement: Agreement) -> None:
    """Check that the callbacks kept the state that the last step began with, and nothing else is kept."""
    kept = agreement._engine._kept._kept
    assert [number for number, _ in kept] == ([12] if name in HELD else [])
    for _, snapshot in kept:
        moved = [
            key
            for key, each in snapshot.tensors.items()
            if each.memory is not None and not each.values.equal(each.memory)
        ]
        assert any(key.startswith("model.") and key.endswith("fc.weight") for key in moved), moved


def _refusals() -> list[str]:
    """Return the errors that the callbacks raise if the state is sharded."""
    from dreplica import lightning, transformers

    trainer, arguments = SimpleNamespace(world_size=2, strategy=SimpleNamespace()), SimpleNamespace(fsdp="full_shard")
    with pytest.raises(ValueError, match="differ by design") as of_lightning:
        lightning.AgreementCallback().on_train_start(trainer, None)
    with pytest.raises(ValueError, match="differ by design") as of_transformers:
        transformers.AgreementCallback().on_train_begin(
            arguments, None, None, model=None, optimizer=None, lr_scheduler=None
        )
    return [str(of_lightning.value), str(of_transformers.value)]


def _steps_of_several_optimizers() -> list[int]:
    """Return the steps that Lightning's callback counts, with its checkpoint and without."""
    from dreplica.lightning import AgreementCallback

    model = nn.Linear(1, 1)
    trainer: Any = SimpleNamespace(
        world_size=1,
        strategy=SimpleNamespace(model=model),
        optimizers=[torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)],
        lr_scheduler_configs=[],
        precision_plugin=None,
        global_step=0,
        current_epoch=0,
    )
    module: Any = None
    callback, again, without = AgreementCallback(), AgreementCallback(), AgreementCallback()
    callback.on_train_start(trainer, module)
    for trainer.global_step in (2, 4, 4, 6):  # the third batch steps neither optimizer
        callback.on_train_batch_end(trainer, module, None, torch.ones(1), 0)
    again.load_state_dict(callback.state_dict())
    for each in (callback, again, without):
        each.on_train_start(trainer, module)
    return [each.agreement.steps_done for each in (callback, again, without) if each.agreement is not None]


def _run_page(folder: str) -> list[str]:
    """Return what each example of the page prints, run in an empty folder, into which they record."""
    dist.init_process_group = lambda *_: None  # it is there already
    os.chdir(folder)
    beginning, examples = examples_of(PAGE)
    return [run(beginning, example) for example in examples]


def _run_all(world: World, folder: str) -> tuple[dict[tuple[str, bool], Any], list[str], list[str], list[int]]:
    warnings.simplefilter("ignore")
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # by which Lightning knows that the ranks are there already
    return _run_loops(world), _run_page(folder), _refusals(), _steps_of_several_optimizers()


@cache
def results() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run_replicas(_run_all, 2, folder, imports=HEAVY, timeout=150.0)


@pytest.mark.parametrize("name", LOOPS)
def test_planted_divergence_stops_all_ranks(name: str) -> None:
    one, two = results()
    assert isinstance(one, tuple), one
    assert one[0] == two[0]
    steps_checked, bytes_per_step = one[0][name, False]
    assert steps_checked == 12
    assert bytes_per_step == READ.get(name, bytes_per_step)  # at the hook, gradients are still there
    verdict = one[0][name, True]
    assert isinstance(verdict, Verdict), verdict
    assert (verdict.step, verdict.epoch, verdict.stage, verdict.tensor) == (STEP, 2, *PLANTED[name])


def test_examples_print_what_the_page_says() -> None:
    one, two = results()
    assert isinstance(one, tuple), one
    _, examples = examples_of(PAGE)
    assert len(examples) == len(one[1]) == 14
    for example, printed in zip(examples, one[1], strict=True):
        assert example.prints(printed), f"{example.code}\nprints\n{printed}"
        assert example.output, example.code
    assert sum(one == two for one, two in zip(one[1], two[1], strict=True)) >= 8  # durations; evidence on rank 0 only


def test_callbacks_reject_sharded_state() -> None:
    one, two = results()
    assert isinstance(one, tuple), one
    assert one[2] == two[2]
    assert all("AgreementCallback(expect=" in message for message in one[2])


def test_lightning_continues_count_after_checkpoint() -> None:
    one, _ = results()
    assert isinstance(one, tuple), one
    assert one[3] == [3, 3, 6]
