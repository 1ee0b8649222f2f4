"""Restore of any state of model, criterion and optimizer: training continues as if it had not been interrupted."""

import random
from collections import Counter, deque
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.training.checkpoint.file_format import CheckpointError, Contents, parse, read_files, write_checkpoint
from dreplica.training.checkpoint.portable import Originals, Portable, is_portable
from dreplica.training.checkpoint.replica_state import attributes_as_built, copy_state, restore_state

CPU = torch.device("cpu")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 5))


class Counting(nn.Module):
    """Counts in attributes of every kind, also under names that begin with an underscore."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self._calls = 0
        self.array = numpy.zeros(2)
        self.seen = deque([0.0, 0.0], maxlen=2)
        self.shared: Counter[str] = Counter()
        self.same_again = self.shared
        self.drawn = numpy.random.RandomState(3)
        self.legacy = random.Random(4)

    def forward(self, inputs: Tensor) -> Tensor:
        self._calls += 1
        self.array += self._calls
        self.seen.append(float(self._calls))
        self.same_again["calls"] += 1
        noise = self.drawn.rand() + self.legacy.random()
        return self.body(inputs) * (self.array[0] + sum(self.seen) + self.shared["calls"] + noise)


class Buffers(nn.Module):
    """Buffers that overlap themselves, that are of odd types, layouts and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.register_buffer("scale", torch.full((1,), 1.5).expand(5))
        self.register_buffer("transposed", torch.rand(5, 4).t())
        self.register_buffer("scalar", torch.tensor(2.0))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer("negative", torch.randn(3, dtype=torch.complex64).conj().imag)
        self.register_buffer("float8", torch.randn(4).to(torch.float8_e4m3fn))
        self.register_buffer("uint16", torch.arange(4).to(torch.uint16))

    def forward(self, inputs: Tensor) -> Tensor:
        self.sparse = self.sparse * 1.5
        return self.body(inputs) * self.scale * self.scalar * self.sparse.sum()


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        self.register_buffer("seen", torch.zeros(1))
        self._calls = 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.seen += 1
        self._calls += 1
        return nn.functional.cross_entropy(logits * self.weight * (self.seen + self._calls), labels)


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer, and shares its state."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self.param_groups, self.state = inner.param_groups, inner.state
        self.steps = 0
        self.slow = [parameter.detach().clone() for parameter in self.parameters]

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.steps += 1
        for slow, parameter in zip(self.slow, self.parameters, strict=True):
            if self.steps % 2 == 0:
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


class Wrapping(torch.optim.Optimizer):
    """Wraps another optimizer, whose state is its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:
        self.base.step()


class Halves(torch.optim.Optimizer):
    """Keeps an optimizer for each half of the parameters in a list."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        given = self.param_groups[0]["params"]
        halves = given[: len(given) // 2], given[len(given) // 2 :]
        self.halves = [torch.optim.Adam(half, lr=0.01) for half in halves]

    def step(self, closure: Any = None) -> None:
        for half in self.halves:
            half.step()


class Noisy(nn.Module):
    """Draws from generators that it keeps in a dict and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.generators = {"python": [random.Random(5)], "torch": torch.Generator().manual_seed(6)}

    def forward(self, inputs: Tensor) -> Tensor:
        noise = torch.rand((), generator=self.generators["torch"]) + self.generators["python"][0].random()
        return self.body(inputs) * noise


class Color(Enum):
    RED = 1


class Odd(torch.optim.Optimizer):
    """Keeps NumPy's numbers, lists of tensors, and what belongs to no parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": numpy.float64(0.1), "color": Color.RED, "decay": lambda step: 0.9**step})
        self.state["all"] = {"steps": 0}
        self._norms: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["all"]["steps"] += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("history", []).append(parameter.grad.norm())
                state["sum"] = numpy.float32(state.get("sum", 0) + float(parameter.grad.sum()))
                self._norms.append(float(state["history"][-1]))
                rate = float(group["lr"]) * group["decay"](self.state["all"]["steps"])
                parameter.sub_(parameter.grad, alpha=rate * (1 + 0.01 * float(state["sum"]) + 1e-4 * sum(self._norms)))


def make(
    model: Callable[[], nn.Module] = net,
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    scheduler: Callable[[torch.optim.Optimizer], Any] = lambda _: None,
    criterion: Callable[[], nn.Module] = nn.CrossEntropyLoss,
) -> Callable[[], Replica]:
    def build() -> Replica:
        parts = model(), criterion()
        own = optimizer([parameter for part in parts for parameter in part.parameters()])
        return Replica(*parts, own, scheduler(own))

    return build


schedules = torch.optim.lr_scheduler
REPLICAS = {
    "attributes": make(Counting),
    "buffers": make(Buffers),
    "loss with state": make(criterion=Loss),
    "wrapped optimizer, shared state": make(optimizer=lambda given: Lookahead(torch.optim.Adam(given, lr=0.01))),
    "wrapped optimizer": make(optimizer=Wrapping),
    "optimizers in a list": make(optimizer=Halves),
    "generators in containers": make(Noisy),
    "odd optimizer": make(optimizer=Odd),
    "fused": make(optimizer=lambda given: torch.optim.AdamW(given, lr=torch.tensor(0.01), fused=True)),
    "Adafactor": make(optimizer=torch.optim.Adafactor),
    "a rate of NumPy's": make(scheduler=lambda own: schedules.LambdaLR(own, lambda step: numpy.cos(step / 9))),
    "one after the other": make(
        scheduler=lambda own: schedules.SequentialLR(
            own, [schedules.LinearLR(own, total_iters=2), schedules.CosineAnnealingLR(own, 5)], [2]
        )
    ),
    "cyclic": make(
        scheduler=lambda own: schedules.CyclicLR(own, 0.01, 0.1, 3, cycle_momentum=False, scale_fn=lambda x: 0.5**x)
    ),
}


def take_steps(replica: Replica, first: int, count: int) -> None:
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        inputs, labels = torch.randn(4, 6, generator=generator), torch.randint(5, (4,), generator=generator)
        replica.optimizer.zero_grad()
        replica.criterion(replica.model(inputs), labels).backward()
        replica.optimizer.step()
        if replica.scheduler is not None:
            replica.scheduler.step()
        replica.steps_done += 1


def weights(replica: Replica) -> list[bytes]:
    parameters = [*replica.model.parameters(), *replica.criterion.parameters()]
    return [parameter.detach().numpy().tobytes() for parameter in parameters]


def through_disk(contents: Contents, folder: Path) -> Contents:
    write_checkpoint(folder / "step_000003", contents)
    return parse(read_files(folder / "step_000003"))


@pytest.mark.parametrize("build", REPLICAS.values(), ids=REPLICAS.keys())
def test_restored_replica_continues_identically(build: Callable[[], Replica], tmp_path: Path) -> None:
    seed_generators(1)
    replica = build()
    as_built = attributes_as_built(replica)
    take_steps(replica, 0, 3)
    contents = copy_state(replica, Position(), {}, as_built).contents()
    take_steps(replica, 3, 4)
    seed_generators(99)
    other = build()
    restore_state(other, through_disk(contents, tmp_path), attributes_as_built(other))
    take_steps(other, 3, 4)
    assert weights(other) == weights(replica)


def test_restore_reads_checkpoints_without_nested_state(tmp_path: Path) -> None:
    """Earlier versions did not save optimizers and generators within containers."""
    replica = make(Noisy, Halves)()
    as_built = attributes_as_built(replica)
    take_steps(replica, 0, 2)
    contents = copy_state(replica, Position(), {}, as_built).contents()
    saved = contents.optimizer
    for path in ("optimizer.halves.0", "optimizer.halves.1"):
        del saved["attributes"][path], saved["generators"][path], saved["optimizers"][1]
    saved["generators"]["model"].clear()
    other = make(Noisy, Halves)()
    restore_state(other, through_disk(contents, tmp_path), attributes_as_built(other))
    assert weights(other) == weights(replica)
    assert not other.optimizer.halves[0].state


def test_unchanged_attributes_are_not_restored(tmp_path: Path) -> None:
    """Replicas share one copy, so an attribute that says where rank 0 runs must not reach the others."""
    one, other = make(Counting)(), make(Counting)()
    one.model.place, other.model.place = "cuda:0", "cuda:1"  # type: ignore[assignment]
    as_built = attributes_as_built(one)
    take_steps(one, 0, 1)
    restore_state(
        other,
        through_disk(copy_state(one, Position(), {}, as_built).contents(), tmp_path),
        attributes_as_built(other),
    )
    assert other.model.place == "cuda:1"
    assert other.model._calls == 1


def test_failed_restore_leaves_no_attributes(tmp_path: Path) -> None:
    replica = make(Counting)()
    replica.model.phase = "warm-up"  # type: ignore[assignment]
    as_built = attributes_as_built(replica)
    early = copy_state(replica, Position(), {}, as_built).contents()
    replica.model.phase = "decay"  # type: ignore[assignment]
    take_steps(replica, 0, 1)
    late = copy_state(replica, Position(), {}, as_built).contents()
    late.tensors["body.0.weight"].add_(1)
    other = make(Counting)()
    other.model.phase = "warm-up"  # type: ignore[assignment]
    as_built = attributes_as_built(other)
    with pytest.raises(CheckpointError, match="in weights differs from its saved digest"):
        restore_state(other, late, as_built)
    assert other.model.phase == "decay"
    restore_state(other, through_disk(early, tmp_path), as_built)
    assert (other.model.phase, other.model._calls) == ("warm-up", 0)


def test_portable_copies_convert_back() -> None:
    shared = torch.rand(2)
    value = {
        "a": [shared, (shared, numpy.float32(0.1), numpy.arange(6.0).reshape(2, 3))],
        ("b", 1): deque([1, -0.0], maxlen=4),
        "c": frozenset({2}),
        "d": {10**400, "x"},
    }
    assert is_portable(value)
    copied = Portable(Tensor.clone).of(value)
    back = Originals(CPU).of(copied)
    assert repr(back) == repr(value)
    assert back["a"][0] is back["a"][1][0] is not shared
    assert not is_portable([Color.RED])


def test_device_tensors_return_to_present_device() -> None:
    tensor = torch.empty(3, device="meta")
    kept = Portable(lambda tensor: torch.zeros(3)).of([tensor, tensor, torch.zeros(2)])
    one, again, on_cpu = Originals(torch.device("meta")).of(kept)
    assert one is again
    assert (one.device.type, on_cpu.device.type) == ("meta", "cpu")
