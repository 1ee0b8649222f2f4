"""`dreplica.diagnose` on replicas whose states have different structures: one finding each, on all ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR, StepLR

import dreplica
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.process_group import World
from dreplica.errors import SharedUsageError
from dreplica.state.rng import seed_generators
from tests.diagnosis.test_diagnose_step import Wrong
from tests.harness import run_replicas
from tests.messages import codes, data_of, texts


class Named(nn.Module):
    """Layers that are called in one order and registered in another."""

    def __init__(self, layers: nn.Sequential, order: str) -> None:
        super().__init__()
        for name in order:
            self.add_module(f"layer{name}", layers[int(name)])

    def forward(self, values: Tensor) -> Tensor:
        for name in "01234":
            values = getattr(self, f"layer{name}")(values)
        return values


class Loop:
    """A custom loop whose parts a test changes on one replica before it asks."""

    def __init__(self) -> None:
        seed_generators(0)
        self.model: Any = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer: Any = None
        self.batch: Any = (torch.randn(20, 8), torch.arange(20) % 3)
        self.others: list[Any] = []
        self.clips = False
        self.returns = True

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def adam(self, parameters: Any = None) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters if parameters is None else parameters, lr=0.01)

    def step(self, batch: Any) -> Tensor | None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        if self.clips:
            torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 0.01)
        self.optimizer.step()
        return loss if self.returns else None

    def ask(self, found: Verdict | None = None) -> Verdict:
        if self.optimizer is None:
            self.adam()
        return dreplica.diagnose(self.step, self.batch, self.model, self.optimizer, others=self.others, found=found)


Change = Callable[[Loop, bool], Any]
CHANGES: dict[str, Change] = {}


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


@change
def order(loop: Loop, one: bool) -> None:
    loop.adam(loop.parameters[::-1] if one else loop.parameters)


@change
def order_after_steps(loop: Loop, one: bool) -> None:
    loop.adam(loop.parameters[::-1] if one else loop.parameters)
    loop.step(loop.batch)


@change
def order_and_values(loop: Loop, one: bool) -> None:
    order_after_steps(loop, one)
    if one:
        loop.model[4].bias.data[1] += 1.0


@change
def order_of_modules(loop: Loop, one: bool) -> None:
    loop.model = Named(loop.model, "43210" if one else "01234")
    loop.adam()
    loop.step(loop.batch)


@change
def order_of_groups(loop: Loop, one: bool) -> None:
    groups = [{"params": loop.parameters[:2], "lr": 0.1}, {"params": loop.parameters[2:], "lr": 0.2}]
    loop.adam(groups[::-1] if one else groups)


@change
def number_of_groups(loop: Loop, one: bool) -> None:
    loop.adam([{"params": loop.parameters[:2]}, {"params": loop.parameters[2:]}] if one else None)


@change
def exchanged_between_groups(loop: Loop, one: bool) -> None:
    parameters = loop.parameters
    if one:
        parameters[0], parameters[-1] = parameters[-1], parameters[0]
    loop.adam([{"params": parameters[:2]}, {"params": parameters[2:]}])


@change
def not_in_optimizer(loop: Loop, one: bool) -> None:
    loop.adam(loop.parameters[1:] if one else None)


@change
def shape(loop: Loop, one: bool) -> None:
    if one:
        loop.model[4] = nn.Linear(8, 4)


@change
def dtype(loop: Loop, one: bool) -> None:
    if one:
        loop.model[4].bias.data = loop.model[4].bias.data.bfloat16()


@change
def missing_parameter(loop: Loop, one: bool) -> None:
    if one:
        loop.model[4] = nn.Linear(8, 3, bias=False)


@change
def extra_buffer(loop: Loop, one: bool) -> None:
    if one:
        loop.model.register_buffer("extra", torch.ones(3))


@change
def sparse_buffer(loop: Loop, one: bool) -> None:
    loop.model.register_buffer("extra", torch.eye(3).to_sparse() if one else torch.eye(3))


@change
def no_step_taken(loop: Loop, one: bool) -> None:
    loop.adam()
    if not one:
        loop.step(loop.batch)


@change
def optimizer_kind(loop: Loop, one: bool) -> None:
    loop.adam()
    if one:
        loop.optimizer = torch.optim.SGD(loop.parameters, lr=0.1)


@change
def scheduler_missing(loop: Loop, one: bool) -> None:
    loop.adam()
    loop.others = [] if one else [StepLR(loop.optimizer, 1)]


@change
def scheduler_kind(loop: Loop, one: bool) -> None:
    loop.adam()
    loop.others = [ExponentialLR(loop.optimizer, 0.9) if one else StepLR(loop.optimizer, 1)]


@change
def batch_shape(loop: Loop, one: bool) -> None:
    if one:
        loop.batch = (loop.batch[0][:10], loop.batch[1][:10])


@change
def batch_missing(loop: Loop, one: bool) -> None:
    if one:
        loop.batch = None


@change
def mode(loop: Loop, one: bool) -> None:
    loop.model[1].train(not one)


@change
def mode_that_is_not_used(loop: Loop, one: bool) -> None:
    loop.model[3].train(not one)


@change
def returned(loop: Loop, one: bool) -> None:
    loop.returns = not one


EXPECTED: dict[str, tuple[str, str | None, str | None, str]] = {
    "order": ("order-differs", "optimizer", None, "position 0: 0.weight on replica 0; 4.bias on replica 1"),
    "order_after_steps": ("order-differs", "optimizer", None, "(6 positions differ): position 0: 0.weight on"),
    "order_and_values": ("order-differs", "optimizer", None, "(weights, 4.bias): all began with replica 0's"),
    "order_of_modules": ("order-differs", "weights", None, "0: layer0.weight on replica 0; layer4.weight on replica 1"),
    "order_of_groups": (
        "order-differs",
        "optimizer",
        "0.weight",
        "0.weight: group 0 of the optimizer on replica 0; group 1 of the optimizer on replica 1",
    ),
    "number_of_groups": ("structure-differs", "optimizer", "1.weight", "parameters are in different groups"),
    "exchanged_between_groups": ("structure-differs", "optimizer", "0.weight", "parameters are in different groups"),
    "not_in_optimizer": ("structure-differs", "optimizer", "0.weight", "missing on replica 1"),
    "shape": ("structure-differs", "weights", "4.weight", "4.weight: parameter float32 (3, 8) on replica 0; parameter"),
    "dtype": ("structure-differs", "weights", "4.bias", "parameter bfloat16 (3,) on replica 1"),
    "missing_parameter": ("structure-differs", "weights", "4.bias", "missing on replica 1"),
    "extra_buffer": ("structure-differs", "buffers", "extra", "missing on replica 0; float32 (3,) on replica 1"),
    "sparse_buffer": ("structure-differs", "buffers", "extra", "float32 sparse_coo (3, 3) on replica 1"),
    "no_step_taken": ("structure-differs", "optimizer", "0.weight.step", "has no state on replicas [1]"),
    "optimizer_kind": ("structure-differs", "optimizer", None, "optimizer: AdamW on replica 0; SGD on replica 1"),
    "scheduler_missing": ("structure-differs", "optimizer", None, "others[0]: StepLR on replica 0; missing on"),
    "scheduler_kind": ("structure-differs", "optimizer", None, "StepLR on replica 0; ExponentialLR on replica 1"),
    "batch_shape": ("batch-differs", "batch", "inputs", "inputs: float32 (20, 8) on replica 0; float32 (10, 8) on"),
    "batch_missing": ("batch-differs", "batch", "inputs", "labels: int64 (20,) on replica 0; missing on replica 1"),
    "mode": ("structure-differs", "buffers", "1.running_mean", "1: training mode on replica 0; evaluation mode on"),
    "mode_that_is_not_used": ("none", None, None, "3: training mode on replica 0; evaluation mode on replica 1"),
    "returned": ("structure-differs", "output", "returned.0", "returned.0 only on replicas [0]"),
}


def _ask_all(world: World) -> dict[str, Verdict]:
    torch.set_num_threads(1)
    found = {}
    for name, function in CHANGES.items():
        loop = Loop()
        function(loop, world.replica_id == 1)
        found[name] = loop.ask()
    return found


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    one, two = run_replicas(_ask_all, 2)
    assert isinstance(one, dict), one
    assert one == two
    return one


@pytest.mark.process
@pytest.mark.parametrize("name", list(EXPECTED))
def test_difference_in_structure_is_named(name: str, verdicts: dict[str, Verdict]) -> None:
    verdict = verdicts[name]
    cause, stage, tensor, text = EXPECTED[name]
    assert (verdict.cause, verdict.stage, verdict.tensor) == (cause, stage, tensor)
    lines = texts(verdict.evidence)
    assert any(text in line for line in lines), lines
    assert verdict.agreed or verdict.remedy
    assert set(CHANGES) == set(EXPECTED)


class Unsendable:
    """An object whose state cannot be sent to another process."""

    def state_dict(self) -> dict[str, Any]:
        return {"call": lambda: 1}

    def load_state_dict(self, _: Any) -> None:
        pass


def _fail(world: World) -> dict[str, Any]:
    torch.set_num_threads(1)
    one = world.replica_id == 1
    found: dict[str, Any] = {}

    def attempt(name: str, loop: Loop, **changed: Any) -> None:
        vars(loop).update(changed if one else {})
        try:
            found[name] = loop.ask()
        except SharedUsageError as error:
            found[name] = str(error)

    def loop() -> Loop:
        made = Loop()
        made.adam()
        return made

    def fail(_: Any) -> None:
        raise RuntimeError("boom")

    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    attempt("unreadable", loop(), model=wrapped)
    nn.Module.__init__(wrapped)
    wrapped.module, wrapped.broadcast_buffers = nn.Linear(8, 3), True
    wrapped.process_group = None
    attempt("ddp", loop(), model=wrapped)
    attempt("no model", loop(), model=3)
    attempt("no optimizer", loop(), optimizer={"a": 3})
    attempt("step", loop(), step=fail)
    attempt("batch", loop(), batch=object())
    on_meta = Loop()
    attempt("meta", on_meta, model=on_meta.model.to("meta") if one else None)
    with_object = loop()
    with_object.others = [Unsendable()]
    with_object.optimizer.param_groups[0]["lr"] = 0.5 if one else 0.1
    attempt("object", with_object)
    return found


@pytest.mark.process
def test_failure_on_one_rank_is_raised_on_all() -> None:
    one, two = run_replicas(_fail, 2)
    assert isinstance(one, dict), one
    assert one == two
    assert one["unreadable"].startswith("replica 1: model, optimizer or others cannot be read: AttributeError: ")
    assert one["ddp"].startswith("replica 1: model is wrapped in DistributedDataParallel")
    assert one["no model"].startswith("replica 1: model must be an nn.Module")
    assert one["no optimizer"].startswith("replica 1: optimizer must be an optimizer")
    failures = {name: texts(one[name].evidence)[1] for name in ("step", "batch", "meta")}
    assert {one[name].cause for name in failures} == {"unexplained"}
    assert failures["step"] == "the step could not be replayed: replica 1 raised RuntimeError: boom"
    assert "replica 1 raised UnhashableError: cannot compare the object" in failures["batch"]
    assert "replica 1 raised UnhashableError: " in failures["meta"]
    assert one["object"].cause == "hyperparameter-differs"  # what cannot be sent need not be


def _deep_loop() -> Loop:
    """Return a loop whose gradients have a norm that depends on the order of parameters."""
    for seed in range(1000):
        loop = Loop()
        seed_generators(seed)
        loop.model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)), nn.Linear(8, 3))
        loop.clips = True
        nn.functional.cross_entropy(loop.model(loop.batch[0]), loop.batch[1]).backward()
        norms = [torch.nn.utils.clip_grad_norm_(order, 1e9) for order in (loop.parameters, loop.parameters[::-1])]
        loop.model.zero_grad()
        if norms[0] != norms[1]:
            return loop
    raise AssertionError("the norm never depends on the order")


def _clipped(world: World) -> dict[str, Verdict]:
    """Return verdicts on gradients that are clipped by a norm over parameters in another order."""
    torch.set_num_threads(1)
    found = {}
    for name in ("order", "order, and wrong", "order, batch diverged", "order, weights diverged"):
        loop = _deep_loop()
        one = world.replica_id == 1
        loop.adam(loop.parameters[::-1] if one else loop.parameters)
        diverged = Verdict(False, "unexplained", "diverged", step=7, stage=name.split(" ")[1:2] and name.split(" ")[1])
        wrong = "aten.addmm.default" if one and "wrong" in name else ""
        with Wrong(wrong):
            before = diverged.with_(tensor="x", groups=[[0, 2], [1]]) if "diverged" in name else None
            found[name] = loop.ask(before)
    return found


@pytest.mark.process
def test_order_is_the_cause_only_where_it_explains() -> None:
    one, *others = run_replicas(_clipped, 3)
    assert isinstance(one, dict), one
    assert others == [one, one]
    verdict = one["order"]
    assert (verdict.cause, verdict.suspects, verdict.groups) == ("order-differs", [1], [[0, 2], [1]])
    assert (verdict.stage, verdict.phase) == ("gradients", "optimizer")
    assert codes(verdict.evidence)[-2:] == ["order-differs", "operator-order"]
    assert data_of(verdict.evidence, "order-differs")["names"] == ["0.weight", "20.bias", "0.weight"]
    wrong = one["order, and wrong"]
    assert wrong.cause == "unexplained"
    assert "order-differs" in codes(wrong.evidence)
    assert one["order, batch diverged"].cause == "unexplained"
    weights = one["order, weights diverged"]
    assert (weights.cause, weights.step) == ("order-differs", 7)
