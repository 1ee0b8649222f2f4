"""`dreplica.diagnose` leaves each replica its own values, and names those that must be equal for a step to agree."""

import os
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import dreplica
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.process_group import World
from dreplica.state.rng import seed_generators
from tests.harness import run_replicas
from tests.messages import codes, data_of, texts

DIVERGING_STEP = 3


class Net(nn.Module):
    """(batch, 8) to (batch, 3), with dropout, a private generator and plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.0), nn.Linear(16, 3))
        self.noise = torch.Generator().manual_seed(5)
        self.sigma, self.scale, self.smooth = 0.0, 1.0, False

    def forward(self, x: Tensor) -> Tensor:
        if self.sigma:
            x = x + self.sigma * torch.randn(x.shape, generator=self.noise)
        return self.body(x).tanh() * self.scale if self.smooth else self.body(x) * self.scale


class NoisySGD(torch.optim.SGD):
    """Adds noise from torch's global generator to each update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn(parameter.shape), alpha=1e-3)


class Average:
    """Exponential moving average of a model's parameters, with a decay that no `state_dict` has."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.values = {name: each.detach().clone() for name, each in model.named_parameters()}
        self.decay = decay

    def update(self, model: nn.Module) -> None:
        for name, each in model.named_parameters():
            self.values[name].lerp_(each.detach(), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.values[name].copy_(value)


class Loop:
    """A custom loop. `at_step` runs inside the step function, `before_step` between two steps."""

    def __init__(self, one: bool) -> None:
        seed_generators(0)
        self.one, self.model = one, Net()
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.others: list[Any] = []
        self.average: Average | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self.augment: Callable[[Tensor], Tensor] = lambda x: x
        self.before_step: Callable[[int], None] = lambda number: None
        self.stages: tuple[str, ...] | None = None

    def step(self, batch: Any) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        logits = self.model(self.augment(batch[0]))
        loss = nn.functional.cross_entropy(logits, batch[1])
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        return loss, logits

    def run(self, keep: bool) -> tuple[Verdict, Verdict] | None:
        """Train, and return the verdicts of the comparison and of the diagnosis; None without a divergence."""
        agreement = dreplica.Agreement(self.model, self.optimizer, others=self.others, stages=self.stages)
        for number in range(1, 6):
            batch = torch.randn(6, 8, generator=torch.Generator().manual_seed(number)), torch.arange(6) % 3
            self.before_step(number)
            if keep:
                agreement.keep_state()
            loss, logits = self.step(batch)
            try:
                agreement.step(batch=batch, loss=loss, outputs=logits)
            except dreplica.Divergence as divergence:
                given = {"agreement": agreement} if keep else {"found": divergence.verdict, "others": self.others}
                before = _state(self)
                verdict = dreplica.diagnose(self.step, batch, self.model, self.optimizer, **given)
                assert _state(self) == before
                return divergence.verdict, verdict
        return None


def _state(loop: Loop) -> Any:
    return (
        dreplica.fingerprint(loop.model.state_dict()),
        repr(loop.optimizer.state_dict()),
        [repr(vars(other)) for other in loop.others],
        dreplica.fingerprint({"torch": torch.get_rng_state(), "own": loop.model.noise.get_state()}),
        random.getstate(),
        [module.training for module in loop.model.modules()],
        [None if each.grad is None else each.grad.tolist() for each in loop.model.parameters()],
        (loop.model.sigma, loop.model.scale, loop.model.smooth),
    )


Plant = Callable[[Loop], None]
PLANTS: dict[str, Plant] = {}


def plant(function: Plant) -> Plant:
    PLANTS[function.__name__] = function
    return function


def at_divergence(loop: Loop, action: Callable[[], Any]) -> None:
    """Run an action on replica 1, just before the step that is to diverge."""
    loop.before_step = lambda number: action() if loop.one and number == DIVERGING_STEP else None


@plant
def dropout_seeded_by_rank(loop: Loop) -> None:
    loop.model.body[1].p, loop.stages = 0.5, ("output", "gradients", "optimizer", "weights")
    torch.manual_seed(10 + loop.one)


@plant
def noise_in_optimizer(loop: Loop) -> None:
    loop.optimizer, loop.stages = NoisySGD(loop.model.parameters(), lr=0.1), ("gradients", "optimizer", "weights")
    torch.manual_seed(10 + loop.one)


@plant
def augmentation_in_step(loop: Loop) -> None:
    loop.augment, loop.stages = lambda x: x + torch.randn(x.shape), ("gradients", "weights")
    torch.manual_seed(10 + loop.one)


@plant
def python_random_in_step(loop: Loop) -> None:
    loop.augment, loop.stages = lambda x: x * random.random(), ("output", "gradients", "weights")
    random.seed(10 + loop.one)


@plant
def numpy_random_in_step(loop: Loop) -> None:
    loop.augment = lambda x: x + torch.from_numpy(numpy.random.rand(*x.shape)).float()
    loop.stages = ("output", "weights")
    numpy.random.seed(10 + loop.one)


@plant
def generator_of_model(loop: Loop) -> None:
    loop.model.sigma = 0.1
    loop.model.noise.manual_seed(10 + loop.one)


@plant
def lr_by_rank(loop: Loop) -> None:
    at_divergence(loop, lambda: loop.optimizer.param_groups[0].update(lr=0.05))


@plant
def weight_decay_by_environment(loop: Loop) -> None:
    os.environ["DECAY"] = "0.5" if loop.one else "0.0"
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1, weight_decay=float(os.environ["DECAY"]))
    loop.stages = ("gradients", "weights")


@plant
def scale_of_scaler(loop: Loop) -> None:
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    loop.others = [loop.scaler]
    at_divergence(loop, lambda: loop.scaler.update(32768.0))


@plant
def decay_of_average(loop: Loop) -> None:
    loop.average = Average(loop.model, 0.9 if loop.one else 0.99)
    loop.others = [loop.average]


@plant
def best_of_plateau(loop: Loop) -> None:
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(loop.optimizer)
    loop.others = [scheduler]
    at_divergence(loop, lambda: scheduler.step(0.5))


@plant
def module_left_in_eval(loop: Loop) -> None:
    loop.model.body[1].p = 0.5
    at_divergence(loop, lambda: loop.model.body[1].eval())


@plant
def attribute_of_module(loop: Loop) -> None:
    at_divergence(loop, lambda: setattr(loop.model, "scale", 1.5))


@plant
def switch_of_module(loop: Loop) -> None:
    at_divergence(loop, lambda: setattr(loop.model, "smooth", True))


@plant
def frozen_parameter(loop: Loop) -> None:
    at_divergence(loop, lambda: loop.model.body[0].weight.requires_grad_(False))


EXPECTED: dict[str, tuple[str, str]] = {
    "dropout_seeded_by_rank": ("generators-differ", "torch's generator"),
    "noise_in_optimizer": ("generators-differ", "torch's generator"),
    "augmentation_in_step": ("generators-differ", "torch's generator"),
    "python_random_in_step": ("generators-differ", "Python's random"),
    "numpy_random_in_step": ("generators-differ", "NumPy's global generator"),
    "generator_of_model": ("generators-differ", "noise"),
    "lr_by_rank": ("hyperparameter-differs", "group0.lr 0.1 on replica 0, 0.05 on replica 1"),
    "weight_decay_by_environment": (
        "hyperparameter-differs",
        "group0.weight_decay 0.0 on replica 0, 0.5 on replica 1",
    ),
    "scale_of_scaler": ("hyperparameter-differs", "GradScaler.scale 65536.0 on replica 0, 32768.0 on replica 1"),
    "decay_of_average": ("hyperparameter-differs", "Average.decay 0.99 on replica 0, 0.9 on replica 1"),
    "best_of_plateau": ("hyperparameter-differs", "ReduceLROnPlateau.best inf on replica 0, 0.5 on replica 1"),
    "module_left_in_eval": ("structure-differs", "body.1 training mode on replica 0, evaluation mode on replica 1"),
    "attribute_of_module": ("host-value-differs", "scale 1.0 on replica 0, 1.5 on replica 1"),
    "switch_of_module": ("structure-differs", "smooth False on replica 0, True on replica 1"),
    "frozen_parameter": ("structure-differs", "body.0.weight.requires_grad True on replica 0, False on replica 1"),
}


def _diagnose_all(world: World) -> dict[tuple[str, bool], Any]:
    torch.set_num_threads(1)
    found = {}
    for name, function in PLANTS.items():
        for keep in (False, True):
            loop = Loop(world.replica_id == 1)
            function(loop)
            found[name, keep] = loop.run(keep)
    return found


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, bool], Any]:
    one, two = run_replicas(_diagnose_all, 2, timeout=240.0)
    assert isinstance(one, dict), one
    assert one == two
    return one


@pytest.mark.process
@pytest.mark.parametrize("keep", [False, True], ids=["present", "kept"])
@pytest.mark.parametrize("name", list(EXPECTED))
def test_own_value_is_named_as_the_cause(name: str, keep: bool, verdicts: dict[tuple[str, bool], Any]) -> None:
    found, verdict = verdicts[name, keep]
    cause, value = EXPECTED[name]
    lines = texts(verdict.evidence)
    assert verdict.cause == cause, lines
    assert any(value in line for line in lines), lines
    is_mode = name in ("module_left_in_eval", "frozen_parameter")
    assert ("equal-modes-agree" if is_mode else "equal-values-agree") in codes(verdict.evidence)
    assert ("set-modes-alike" in codes(verdict.remedy)) == is_mode
    assert codes(verdict.evidence).count("own-values-differ") == 1
    assert verdict.step == found.step
    assert verdict.remedy
    if cause == "generators-differ":
        assert __file__ in data_of(verdict.evidence, "first-draw-differs")["draws"][0]


def _ddp_write(world: World) -> tuple[Verdict, Verdict]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(100 + world.replica_id)
    batch = torch.ones(6, 8), torch.arange(6) % 3

    def step(net: nn.Module) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        return loss

    agreement = dreplica.Agreement(ddp, optimizer)
    agreement.keep_state()
    step(ddp)
    if world.replica_id == 0:
        model[0].weight.data.clamp_(-0.1, 0.1)
    with pytest.raises(dreplica.Divergence) as raised:
        agreement.step()
    return raised.value.verdict, dreplica.diagnose(lambda _: step(model), batch, model, optimizer, agreement=agreement)


@pytest.mark.process
def test_dropout_of_ddp_ranks_keeps_place_and_remedy() -> None:
    """The ranks' draws differ by design, so that replays show nothing of a write outside of the step."""
    found, verdict = run_replicas(_ddp_write, 2)[0]
    assert (verdict.cause, verdict.stage, verdict.tensor) == ("unexplained", "weights", found.tensor)
    assert "draws-by-design" in codes(verdict.evidence)
    assert codes(verdict.remedy) == codes(found.remedy)
    assert codes(verdict.remedy)[0] == "ddp-write-alike"


def test_every_plant_is_expected() -> None:
    assert set(PLANTS) == set(EXPECTED)
