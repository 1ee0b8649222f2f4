"""`Agreement` in custom loops: other structures, lost replicas, all optimizers, no process group."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.protocol import fold
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.distributed.liveness.lost import ReplicaLost
from dreplica.distributed.process_group import World
from dreplica.state.stages import optimizer_stage
from tests.agreement.bodies import seed_everything, tiny_model
from tests.distributed.test_control import resources, returns_to
from tests.harness import run_replicas
from tests.trace_rows import read_rows

# Different structure


def _structure(world: World, kind: str) -> Verdict | None:
    seed_everything(0)
    model, odd = tiny_model(), world.replica_id == 1
    inputs, labels = torch.ones(2, 1, 4, 4), torch.tensor([0, 1])
    if kind == "model" and odd:
        model.append(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    try:
        agreement = Agreement(model, optimizer, channel=world.channel)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        if kind == "gradient" and odd:
            model[5].weight.grad = None
        if not (kind == "state" and odd):
            optimizer.step()
        if kind == "evaluation" and odd:
            agreement.evaluation({"logits": torch.ones(1)})
        agreement.step(
            batch=None if kind == "batch" and odd else {"x": inputs, "y": labels},
            loss=torch.ones(()) if kind == "loss" and odd else None,
        )
    except Divergence as divergence:
        return divergence.verdict
    return agreement.divergence


def _structures(world: World) -> dict[str, Verdict | None]:
    return {kind: _structure(world, kind) for kind in STRUCTURES}


STRUCTURES = {
    "model": ["structure-differs", 0, "weights", "6.weight"],
    "batch": ["structure-differs", 1, "batch", "x"],
    "loss": ["structure-differs", 1, "output", "loss"],
    "gradient": ["unexplained", 1, "gradients", "5.weight"],
    "state": ["structure-differs", 1, "optimizer", "0.weight.momentum_buffer"],
    "evaluation": ["structure-differs", 0, None, None],
}


def test_different_structure_is_a_verdict() -> None:
    one, two, three = run_replicas(_structures, 3)
    assert isinstance(one, dict), one
    assert one == two == three
    for kind, verdict in one.items():
        assert verdict is not None, kind
        assert [verdict.cause, verdict.step, verdict.stage, verdict.tensor] == STRUCTURES[kind]
        assert verdict.suspects == [1]


# A lost replica


def _fail(world: World, how: str, own_channel: bool) -> None:
    seed_everything(0)
    model = tiny_model()
    agreement = Agreement(model, channel=world.channel if own_channel else None)
    for step in range(1, 4):
        if step == 2 and world.replica_id == 1:
            if how == "raises":
                raise ArithmeticError("in mid-step")
            os._exit(9)
        agreement.step()


@pytest.mark.parametrize("how", ["raises", "exits"])
@pytest.mark.parametrize("own_channel", [True, False])
def test_survivors_raise_replica_lost(how: str, own_channel: bool) -> None:
    # The world's own timeout is longer: a replica that waits until then returns nothing here.
    results = run_replicas(_fail, 3, how, own_channel, timeout=20.0)
    assert isinstance(results[1], ArithmeticError) if how == "raises" else results[1] is None
    assert isinstance(results[0], ReplicaLost)
    assert isinstance(results[2], ReplicaLost)


# A library for any loop


def test_agreement_without_process_group() -> None:
    assert not dist.is_initialized()
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agreement = Agreement(model, optimizer)
    inputs, labels = torch.ones(2, 1, 4, 4), torch.tensor([0, 1])
    assert agreement.step(batch=(inputs, labels), loss=torch.ones(())) is False
    assert agreement.step(batch=(inputs, labels), stop=True) is True
    agreement.evaluation({"logits": torch.ones(2)})
    agreement.finish()
    assert (agreement.steps_done, agreement.steps_checked, agreement.divergence) == (2, 2, None)
    (own,) = agreement.fingerprints()
    assert set(own) == {"weights", "buffers", "optimizer"}


def test_bytes_per_step() -> None:
    model = nn.Linear(10, 10, dtype=torch.float64)
    agreement = Agreement(model, every=2)
    assert agreement.bytes_per_step == 0
    agreement.step(batch=torch.zeros(3))
    assert agreement.bytes_per_step == 0
    agreement.step(batch=torch.zeros(3), loss=torch.zeros(()))
    rng = torch.get_rng_state().nbytes
    assert agreement.bytes_per_step == 110 * 8 + 3 * 4 + 4 + rng
    model(torch.ones(10, dtype=torch.float64)).sum().backward()
    agreement.step()
    agreement.step()
    assert agreement.bytes_per_step == 2 * 110 * 8 + rng


def test_last_digest_is_of_the_last_compared_step() -> None:
    """A replay checks itself against this digest, which is None after a step that is not compared."""
    agreement = Agreement(nn.Linear(2, 2), every=2)
    assert agreement.agreed_until == 0
    words, agreed = [], []
    for _ in range(4):
        agreement.step()
        words.append(agreement.last_digest)
        agreed.append(agreement.agreed_until)
    agreement.step(check=True)
    words.append(agreement.last_digest)
    state = agreement.observe()
    assert [word and word.value for word in words] == [None, fold(2, state), None, fold(4, state), fold(5, state)]
    assert agreed == [0, 2, 2, 4]
    assert agreement.agreed_until == 5
    agreement.step()
    agreement.finish()
    assert agreement.agreed_until == 6


def test_evaluation_compares_state_first(tmp_path: Path) -> None:
    """If not, diverged weights would be reported as a diverged evaluation."""
    with TraceWriter(tmp_path / "trace.jsonl", 1) as trace:
        agreement = Agreement(nn.Linear(2, 2), every=3, trace=trace)
        agreement.step()
        agreement.evaluation({"logits": torch.ones(1)}, batch={"validation batch 0": b"digest"})
        assert agreement.agreed_until == 1
    lines = read_rows(tmp_path)[1:]
    assert [(line["step"], list(line["digests"])) for line in lines] == [
        (0, ["buffers", "weights", "rng"]),
        (1, ["buffers", "weights", "rng"]),
        (1, ["batch", "predictions"]),
    ]


def _one_more_step(world: World, lag: Literal[0, 1]) -> Verdict | None:
    seed_everything(0)
    agreement = Agreement(tiny_model(), lag=lag)
    try:
        for _ in range(3 + world.replica_id):
            agreement.step()
        agreement.finish()
    except Divergence as divergence:
        return divergence.verdict
    return None


@pytest.mark.parametrize("lag", [0, 1])
def test_different_numbers_of_steps_are_found(lag: Literal[0, 1]) -> None:
    one, two = run_replicas(_one_more_step, 2, lag)
    assert isinstance(one, Verdict), one
    assert one == two
    assert (one.cause, one.step, one.stage) == ("structure-differs", 3, None)
    assert "the number of steps taken" in one.summary


@dataclass
class Sample:
    image: Tensor
    path: str


def test_nested_outputs_are_compared_or_named() -> None:
    agreement = Agreement(nn.Linear(2, 2))
    agreement.step(outputs={"hidden": torch.ones(2), "parts": [torch.ones(1)]}, loss=torch.ones(()))
    names = agreement.observe(outputs={"hidden": torch.ones(2), "parts": [torch.ones(1)]})["output"].names
    assert names == ("logits.hidden", "logits.parts.0")
    assert agreement.observe(outputs=Sample(torch.ones(2), "a.png"))["output"].names == ("logits.image", "logits.path")
    with pytest.raises(TypeError, match=r"cannot compare the Linear at 'logits\.model'.*exclude its stage"):
        agreement.step(outputs={"model": nn.Linear(1, 1)})


def _default_group(world: World) -> list[Any]:
    seed_everything(0)
    model = tiny_model()
    agreement = Agreement(model)  # uses the default process group
    agreement.step()
    if world.replica_id == 1:
        model[5].bias.data[0] += 1
    found = None
    try:
        agreement.step()
    except Divergence as divergence:
        found = divergence.verdict.tensor
    return [agreement.steps_done, found, [each["weights"] for each in agreement.fingerprints()]]


def test_agreement_uses_default_process_group() -> None:
    one, two = run_replicas(_default_group, 2)
    assert one == two
    assert one[:2] == [2, "5.bias"]
    assert one[2][0] != one[2][1]


def _elsewhere_by_default(world: World) -> tuple[int, list[dict[str, str]]]:
    seed_everything(0)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 1, 4, 4)).sum().backward()
    scaler = torch.amp.GradScaler("cpu")
    with torch.device("meta"):  # where new tensors go: a user's own may be a GPU
        agreement = Agreement(model, optimizer, others=[scaler], channel=world.channel)
        agreement.step(batch=torch.ones(2, device="cpu"))
        agreement.finish()
        return agreement.agreed_until, agreement.fingerprints()


def test_default_device_does_not_matter() -> None:
    one, two = run_replicas(_elsewhere_by_default, 2)
    assert one == two
    assert one[0] == 1


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
    "two groups": lambda model: torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1:].parameters()}], lr=0.01
    ),
}

lr_scheduler = torch.optim.lr_scheduler
OTHERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.StepLR(optimizer, 1)], milestones=[2]
    ),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 2]),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "GradScaler": lambda _: torch.amp.GradScaler("cpu", init_scale=8.0),
}


def _train_library(world: World, optimizer_name: str, other_name: str, faulty: bool) -> Verdict | None:
    seed_everything(0)
    model = tiny_model()
    optimizer = OPTIMIZERS[optimizer_name](model)
    other = OTHERS[other_name](optimizer)
    agreement = Agreement(model, optimizer, others=[other], on_divergence="continue", channel=world.channel)
    inputs, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    for step in range(1, 4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        if isinstance(other, torch.amp.GradScaler):
            other.scale(loss).backward()
            other.step(optimizer)
            other.update()
        elif isinstance(other, lr_scheduler.ReduceLROnPlateau):
            loss.backward()
            optimizer.step()
            other.step(loss.item())
        else:
            loss.backward()
            optimizer.step()
            other.step()
        if faulty and step == 2 and world.replica_id == 0:
            attribute = "_growth_interval" if other_name == "GradScaler" else "last_epoch"
            setattr(other, attribute, getattr(other, attribute) + 1)
        agreement.step(batch=(inputs, labels), loss=loss)
    return agreement.divergence


def _train_libraries(world: World) -> dict[tuple[str, str, bool], Verdict | None]:
    pairs = [(optimizer, "GradScaler") for optimizer in OPTIMIZERS] + [("SGD", other) for other in OTHERS]
    return {(*pair, faulty): _train_library(world, *pair, faulty) for pair in pairs for faulty in (False, True)}


def test_optimizers_schedulers_and_scalers_are_compared() -> None:
    results = run_replicas(_train_libraries, 3)
    assert results[0] == results[1] == results[2]
    for (_, other, faulty), verdict in results[0].items():
        if not faulty:
            assert verdict is None
            continue
        entry = {"GradScaler": "GradScaler.growth_interval"}.get(other, f"{other}.last_epoch")
        assert verdict is not None, other
        assert (verdict.step, verdict.stage, verdict.tensor, verdict.suspects) == (2, "optimizer", entry, [0])


def _all_optimizers(world: World) -> dict[str, list[dict[str, bytes]]]:
    """Return the optimizer stage before and after a step of every optimizer in torch."""
    hoard: list[object] = [object() for _ in range(10_000 * world.replica_id)]  # other addresses on every replica
    entries = {}
    for name, kind in vars(torch.optim).items():
        if not isinstance(kind, type) or kind is torch.optim.Optimizer or not issubclass(kind, torch.optim.Optimizer):
            continue
        seed_everything(0)
        model = nn.Linear(3, 2, bias=False)  # Muon takes matrices only
        optimizer = kind(model.parameters())

        def closure(model: nn.Module = model, name: str = name) -> Tensor:
            loss = model(torch.ones(1, 3)).square().sum()
            (model.weight.grad,) = torch.autograd.grad(loss, [model.weight])
            if name == "SparseAdam":
                model.weight.grad = model.weight.grad.to_sparse()
            return loss

        before = optimizer_stage(model, optimizer).entries()
        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[arg-type]
        entries[name] = [before, optimizer_stage(model, optimizer).entries()]
    assert len(hoard) == 10_000 * world.replica_id
    return entries


def test_no_torch_optimizer_gives_a_false_alarm() -> None:
    one, two = run_replicas(_all_optimizers, 2)
    assert isinstance(one, dict), one
    assert {"SGD", "Adam", "AdamW", "LBFGS", "Adagrad", "RMSprop", "SparseAdam"} <= set(one)
    for name, (before, after) in one.items():
        assert two[name] == [before, after], name
        assert (after != before) == (name != "SGD"), name  # plain SGD keeps no state


def fails_to_begin(world: World, folder: Path) -> list[Any]:
    """Create an Agreement that fails on rank 1 only, on all ranks, and at the build; then one that works."""
    outcomes: list[Any] = []
    models: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(2, 2, device="meta" if world.replica_id else "cpu"),
        lambda: nn.Linear(2, 2, device="meta"),
        lambda: _constant_model(world.replica_id),
        lambda: _constant_model(0),
    ]
    for number, make in enumerate(models):
        if number == 1:
            before = resources()  # a gloo group with a lost rank stays until the process ends
        started = time.monotonic()
        torch.manual_seed(0)
        try:
            with Agreement(make(), record=folder / str(number), timeout=60) as agreement:
                outcomes.append(agreement.finish().agreed)
        except (TypeError, ReplicaLost, Divergence) as error:
            outcomes.append(type(error).__name__)
        assert time.monotonic() - started < 30
        world.channel.gather(None)
    return [*outcomes, returns_to(before)]


def _constant_model(value: float) -> nn.Module:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return model


def test_failed_constructor_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = run_replicas(fails_to_begin, 2, tmp_path)
    assert rows == [
        ["ReplicaLost", "UnhashableError", "Divergence", True, True],
        ["UnhashableError", "UnhashableError", "Divergence", True, True],
    ]


@pytest.mark.parametrize("predictions", [torch.ones(2), [torch.ones(2), torch.zeros(1)], {"logits": torch.ones(2)}])
def test_evaluation_accepts_tensors_in_any_container(predictions: Any) -> None:
    agreement = Agreement(tiny_model())
    agreement.step()
    agreement.evaluation(predictions)
    assert "predictions" in agreement.stages_seen


def test_evaluation_refuses_what_cannot_be_hashed() -> None:
    with pytest.raises(TypeError, match="cannot compare the object"):
        Agreement(tiny_model()).evaluation([object()])
