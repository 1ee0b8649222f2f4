"""Code that runs once leaves traces that name it, a flipped bit leaves none, and neither does a clean step."""

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreplica.config.schema import TrainConfig
from dreplica.diagnosis.decision.rules import HARDWARE, TRACES_OF_CODE
from dreplica.diagnosis.evidence.finding import Kind
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, set_rng_state
from dreplica.training.corruption import flip_bits
from tests.diagnosis.measurement.one_step import Act, cause_of, findings_on, kinds_of, with_sgd
from tests.fixtures import tiny_model
from tests.messages import data_of


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


def norm(replica: Replica) -> nn.BatchNorm2d:
    return replica.model.body[1]


def last(replica: Replica) -> nn.Linear:
    return replica.model.body[5]


def evidence(findings: Any) -> Any:
    return [line for finding in findings for line in finding.lines]


# ---- an extra draw


def gauss(_replica: Replica, _images: Tensor) -> None:
    random.gauss(0, 1)


DRAWS: dict[str, tuple[Act, str, int]] = {
    "randint": (lambda r, x: void(torch.randint(10, (1,))), "torch.cpu", 1),
    "rand": (lambda r, x: void(torch.rand(1000)), "torch.cpu", 1000),
    "randn": (lambda r, x: void(torch.randn(1)), "torch.cpu", 0),
    "randperm": (lambda r, x: void(torch.randperm(50)), "torch.cpu", 49),
    "dropout": (lambda r, x: void(F.dropout(x)), "torch.cpu", 0),
    "python": (lambda r, x: void(random.random()), "python", 2),
    "shuffle": (lambda r, x: random.shuffle(list(range(100))), "python", 0),
    "gauss": (gauss, "python", 4),
    "numpy": (lambda r, x: void(numpy.random.rand(5)), "numpy", 10),
}


def void(_value: Any) -> None:
    return None


@pytest.mark.parametrize("name", DRAWS)
def test_extra_draw_names_the_generator_and_the_count(name: str) -> None:
    act, generator, count = DRAWS[name]
    findings, differing = findings_on(act)
    assert "rng" in differing
    assert cause_of(findings) == "generators-differ"
    line = data_of(evidence(findings), "original-step-drew")
    assert (line["generator"], line["direction"]) == (generator, "further")
    assert line["draws"] == count or not count


class Noisy(nn.Module):
    """A model with a private generator, which it draws from in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_model(5)
        self.generator = torch.Generator().manual_seed(1)

    def __getitem__(self, index: int) -> nn.Module:
        return self.body[index]

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images + 0.01 * torch.randn(images.shape, generator=self.generator))


def test_extra_draw_from_a_private_generator() -> None:
    def act(replica: Replica, _images: Tensor) -> None:
        torch.rand(3, generator=replica.model.body.generator)

    findings, _ = findings_on(act, body=Noisy)
    assert cause_of(findings) == "generators-differ"
    assert data_of(evidence(findings), "original-step-drew")["generator"] == "model.body.generator"


def test_seeding_again_is_no_fault() -> None:
    findings, _ = findings_on(lambda r, x: void(torch.manual_seed(7)))
    assert cause_of(findings) not in HARDWARE
    findings, differing = findings_on(lambda r, x: random.seed(7))
    assert differing == ["rng"]
    assert cause_of(findings) == "unreplayed-state"


# ---- code that writes, steps, counts, or computes something else once


def without_gradient(act: Callable[[Replica, Tensor], Any]) -> Act:
    def inner(replica: Replica, images: Tensor) -> None:
        with torch.no_grad():
            act(replica, images)

    return inner


def skips(replica: Replica, _images: Tensor) -> None:
    """The optimizer's next step does nothing."""
    step = replica.optimizer.step

    def once(*_args: Any) -> None:
        replica.optimizer.step = step  # type: ignore[method-assign]

    replica.optimizer.step = once  # type: ignore[method-assign]


def steps_twice(replica: Replica, _images: Tensor) -> None:
    step = replica.optimizer.step

    def once(*args: Any) -> None:
        step(*args)
        step(*args)
        replica.optimizer.step = step  # type: ignore[method-assign]

    replica.optimizer.step = once  # type: ignore[method-assign]


def hooks_gradient(change: Callable[[nn.Parameter], None]) -> Act:
    """Change a gradient before the optimizer's next step."""

    def act(replica: Replica, _images: Tensor) -> None:
        def once(*_args: Any) -> None:
            change(last(replica).weight)
            handle.remove()

        handle = replica.optimizer.register_step_pre_hook(once)

    return act


def drops_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def scales_gradient(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def sets(name: str, value: Any) -> Act:
    return lambda replica, images: replica.optimizer.param_groups[0].update({name: value})


def freezes(replica: Replica, _images: Tensor) -> None:
    last(replica).bias.requires_grad_(False)


def extra_backward(replica: Replica, images: Tensor) -> None:
    replica.model.body(images).sum().backward()


WRITES: dict[str, Act] = {
    "clamp": without_gradient(lambda r, x: last(r).bias.clamp_(-1e-4, 1e-4)),
    "scale": without_gradient(lambda r, x: last(r).weight.mul_(0.99)),
    "zero a row": without_gradient(lambda r, x: last(r).weight[0].zero_()),
    "init": lambda r, x: void(nn.init.zeros_(last(r).bias)),
    "renorm": without_gradient(lambda r, x: last(r).weight.renorm_(2, 0, 0.1)),
    "copy": without_gradient(lambda r, x: last(r).bias.copy_(torch.ones(5))),
    "data": lambda r, x: void(last(r).weight.data.mul_(0.99)),
}
COUNTS: dict[str, Act] = {
    "extra forward of a part": without_gradient(lambda r, x: r.model.body[1](r.model.body[0](x * 0.5))),
    "extra forward": without_gradient(lambda r, x: r.model.body(x)),
    "extra forward with a graph": lambda r, x: void(r.model.body(x)),
    "reset": lambda r, x: norm(r).reset_running_stats(),
    "count": lambda r, x: void(norm(r).num_batches_tracked.add_(1)),
    "momentum": lambda r, x: setattr(norm(r), "momentum", 0.5),
}
STEPS: dict[str, Act] = {
    "skipped": skips,
    "twice": steps_twice,
    "another rate": sets("lr", 0.01),
    "weight decay": sets("weight_decay", 0.1),
    "gradient dropped": hooks_gradient(drops_gradient),
}
GRAPHS: dict[str, Act] = {
    "frozen": freezes,
    "extra backward": extra_backward,
    "evaluation mode": lambda r, x: void(norm(r).eval()),
    "more dropout": lambda r, x: setattr(r.model.body[4], "p", 0.9),
    "scaled gradient": hooks_gradient(scales_gradient),
    "inputs in place": lambda r, x: void(x.mul_(1.001)),
}


@pytest.mark.parametrize("name", WRITES)
def test_weight_written_once_is_code(name: str) -> None:
    findings, _ = findings_on(WRITES[name])
    assert cause_of(findings) == "unreplayed-state"
    expected = Kind.OUTSIDE_OPTIMIZER if name == "data" else Kind.WRITTEN_BY_CODE
    assert expected in kinds_of(findings)


@pytest.mark.parametrize("name", COUNTS)
def test_buffers_moved_once_are_code(name: str) -> None:
    findings, differing = findings_on(COUNTS[name])
    assert differing
    assert cause_of(findings) in {"unreplayed-state", "generators-differ"}


@pytest.mark.parametrize("name", STEPS)
def test_other_step_of_the_optimizer_is_code(name: str) -> None:
    findings, differing = findings_on(STEPS[name])
    assert differing
    assert cause_of(findings) == "unreplayed-state"
    assert (Kind.NOT_STEPPED in kinds_of(findings)) == (name == "skipped")


@pytest.mark.parametrize("name", GRAPHS)
def test_other_graph_is_code(name: str) -> None:
    findings, differing = findings_on(GRAPHS[name])
    assert differing
    # An extra forward pass through dropout also draws.
    assert cause_of(findings) == ("generators-differ" if name == "extra backward" else "unreplayed-state")


QUIET: dict[str, Act] = {
    "scaled inputs": lambda r, x: x * 1.001,
    "rounded inputs": lambda r, x: x.bfloat16().float(),
    "flipped images": lambda r, x: x.flip(3),
    "inputs as data": lambda r, x: void(x.data.mul_(1.001)),
    "one pixel as data": lambda r, x: void(x.data[0, 0, 0, 0].fill_(0.1)),
}


@pytest.mark.parametrize("name", QUIET)
def test_code_without_a_counter_is_no_fault_of_hardware(name: str) -> None:
    findings, differing = findings_on(QUIET[name])
    assert differing
    assert cause_of(findings) in {"unexplained", "unreplayed-state"}


def test_value_read_by_code_makes_traces_doubtful() -> None:
    """The code takes another path because of a value, which a fault may have changed."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny_model(5)

        def __getitem__(self, index: int) -> nn.Module:
            return self.body[index]

        def forward(self, images: Tensor) -> Tensor:
            logits = self.body(images)
            return logits if float(logits.detach().abs().max()) < 1e4 else logits * 0.5 + 1.0

    def flips(replica: Replica, _images: Tensor) -> None:
        def once(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            flip_bits(output, 1, random.Random(0), element=3, bit=30)
            handle.remove()

        handle = last(replica).register_forward_hook(once)

    findings, differing = findings_on(flips, body=Branches)
    assert differing
    assert cause_of(findings) == "unexplained"


# ---- a fault of memory leaves no trace of code


def flip_weight(replica: Replica, bits: int, draw: random.Random) -> None:
    flip_bits(last(replica).weight, bits, draw)


def flip_buffer(replica: Replica, bits: int, draw: random.Random) -> None:
    flip_bits(norm(replica).running_var, bits, draw)


def flip_counter(replica: Replica, bits: int, draw: random.Random) -> None:
    flip_bits(norm(replica).num_batches_tracked, bits, draw)


def flip_optimizer(replica: Replica, bits: int, draw: random.Random) -> None:
    flip_bits(replica.optimizer.state[last(replica).bias]["momentum_buffer"], bits, draw)


def flip_generator(_replica: Replica, bits: int, draw: random.Random) -> None:
    state = torch.get_rng_state()
    for place in draw.sample(range(624 * 32), bits):
        state[24 + 8 * (place // 32) + place % 32 // 8] ^= 1 << (place % 8)
    torch.set_rng_state(state)


AFTER = [flip_weight, flip_buffer, flip_counter, flip_optimizer, flip_generator]


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("flip", AFTER)
def test_flip_after_the_step_is_a_few_bits(flip: Callable[[Replica, int, random.Random], None], bits: int) -> None:
    findings, differing = findings_on(after=lambda replica: flip(replica, bits, random.Random(bits)))
    assert len(differing) == 1
    assert kinds_of(findings) == {Kind.FEW_BITS}
    assert cause_of(findings) == "transient-fault"


@pytest.mark.parametrize("bit", range(6))
def test_flipped_low_bit_of_a_counter_is_not_a_count(bit: int) -> None:
    findings, _ = findings_on(
        after=lambda r: flip_bits(norm(r).num_batches_tracked, 1, random.Random(0), element=0, bit=bit)
    )
    assert kinds_of(findings) == {Kind.FEW_BITS}


def flips_inputs(bits: int) -> Act:
    return lambda replica, images: flip_bits(images, bits, random.Random(bits))


def flips_gradient(bits: int) -> Act:
    def flip(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        flip_bits(parameter.grad, bits, random.Random(bits))

    return hooks_gradient(flip)


def flips_logits(bits: int) -> Act:
    def act(replica: Replica, _images: Tensor) -> None:
        def once(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            flip_bits(output, bits, random.Random(bits))
            handle.remove()

        handle = last(replica).register_forward_hook(once)

    return act


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("flips", [flips_inputs, flips_gradient, flips_logits])
def test_flip_within_the_step_is_proved_by_a_replay(flips: Callable[[int], Act], bits: int) -> None:
    findings, differing = findings_on(flips(bits))
    assert len(differing) > 1
    assert kinds_of(findings) == {Kind.FEW_BITS}
    assert "original-whole-difference" in [line.code for line in evidence(findings)]


def flips_activation(index: int, bits: int, draw: random.Random, bit: int | None = None) -> Act:
    def act(replica: Replica, _images: Tensor) -> None:
        def once(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            with torch.no_grad():
                active = (output.flatten() > 0.5).nonzero().flatten().tolist()
                for element in draw.sample(active, bits):
                    flip_bits(output, 1, draw, element=element, bit=bit)
            handle.remove()

        handle = replica.model.body[index].register_forward_hook(once)

    return act


@pytest.mark.parametrize("bit", [None, 0, 22, 27, 30, 31])
@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_flipped_activation_leaves_no_trace_of_code(index: int, bit: int | None) -> None:
    findings, _ = findings_on(flips_activation(index, 1, random.Random(1), bit))
    assert not kinds_of(findings) & TRACES_OF_CODE


@pytest.mark.parametrize("bit", [18, 21, 22, 23, 31])
@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_flipped_activation_is_proved_by_a_search(index: int, bit: int) -> None:
    """One of the modules through which the same number passes is named."""
    findings, differing = findings_on(flips_activation(index, 1, random.Random(bit), bit))
    assert kinds_of(findings) == {Kind.FEW_BITS} or not differing, "or dropout has masked it"
    if findings:
        line = data_of(evidence(findings), "original-activation-flipped")
        assert line["module"] in {"body.1", "body.2", "body.3", "body.4"}
        assert len(line["places"]) == 1


def test_several_flipped_bits_of_one_activation_are_proved() -> None:
    findings, _ = findings_on(flips_activation(4, 3, random.Random(3), bit=21))
    assert kinds_of(findings) == {Kind.FEW_BITS}
    assert len(data_of(evidence(findings), "original-activation-flipped")["places"]) == 3


@pytest.mark.parametrize("factor", [1.001, 0.5])
def test_scaled_activation_is_no_flipped_bit(factor: float) -> None:
    def act(replica: Replica, _images: Tensor) -> None:
        def once(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            output.data.mul_(factor)
            handle.remove()

        handle = replica.model.body[2].register_forward_hook(once)

    findings, differing = findings_on(act)
    assert differing[0] == "output"
    assert kinds_of(findings) == {Kind.SPREAD}


# ---- a clean step leaves nothing


def with_adamw(model: nn.Module) -> Replica:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, scheduler, scheduler_per="step")


def with_scaler(model: nn.Module) -> Replica:
    replica = with_sgd(model)
    replica.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    return replica


def with_average(model: nn.Module) -> Replica:
    """An average of the weights, which a hook of the optimizer moves."""
    replica = with_sgd(model)
    model.average = nn.ParameterList([p.detach().clone() for p in model.body.parameters()]).requires_grad_(False)

    def average(*_args: Any) -> None:
        with torch.no_grad():
            for mean, parameter in zip(model.average, model.body.parameters(), strict=True):
                mean.lerp_(parameter, 0.1)

    replica.optimizer.register_step_post_hook(average)
    return replica


def with_rmsprop(model: nn.Module) -> Replica:
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.RMSprop(model.parameters(), momentum=0.5, centered=True))


class Counting(nn.Module):
    """A model that counts its calls, caches a table at the first, and writes to a buffer at each second one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_model(5)
        self.calls, self.table = 0, None
        self.register_buffer("mean", torch.zeros(8))

    def __getitem__(self, index: int) -> nn.Module:
        return self.body[index]

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.table is None:
            self.table = torch.linspace(0.9, 1.1, 8)
        if self.calls % 2:
            self.mean.add_(images.mean(dim=(0, 1, 2)))
        return self.body(images * self.table) * (1.0 if self.calls % 2 else 1.5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(24, 16, batch_first=True, dropout=0.1, num_layers=2), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.rnn(images.flatten(1, 2).transpose(1, 2)[:, :, :24])[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True), nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images.permute(0, 3, 1, 2).flatten(2)).mean(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_model(5)

    def forward(self, images: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.body, images, use_reentrant=False)


CLEAN: dict[str, dict[str, Any]] = {
    "SGD": {},
    "AdamW": {"build": with_adamw},
    "RMSprop": {"build": with_rmsprop},
    "scaler": {"build": with_scaler, "config": TrainConfig(amp="fp16")},
    "bf16": {"config": TrainConfig(amp="bf16")},
    "average": {"build": with_average},
    "accumulate": {"config": TrainConfig(accumulate=2, grad_clip=0.1)},
    "channels last": {"body": lambda: tiny_model(5).to(memory_format=torch.channels_last)},
    "private generator": {"body": Noisy},
    "counting": {"body": Counting},
    "LSTM": {"body": Recurrent},
    "attention": {"body": Attention},
    "checkpoint": {"body": Checkpointed},
    "compiled": {"body": lambda: torch.compile(tiny_model(5), backend="aot_eager")},
}


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_clean_step_leaves_no_finding(name: str, at: int) -> None:
    findings, differing = findings_on(at=at, **CLEAN[name])
    assert differing == []
    if (name, at) == ("compiled", 1):  # compiling makes nodes, on all replicas, so it does not divide them
        return
    assert findings == []


@pytest.mark.parametrize("name", [name for name in CLEAN if name not in ("LSTM", "attention", "checkpoint")])
def test_flip_after_a_step_leaves_no_trace_in_any_model(name: str) -> None:
    findings, differing = findings_on(
        after=lambda r: flip_bits(next(r.model.body.parameters()), 2, random.Random(1)), **CLEAN[name]
    )
    assert differing == ["weights"]
    assert kinds_of(findings) == {Kind.FEW_BITS}


class Logging(nn.Module):
    """A model that reads a value into Python in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_model(5)

    def __getitem__(self, index: int) -> nn.Module:
        return self.body[index]

    def forward(self, images: Tensor) -> Tensor:
        images.mean().item()
        return self.body(images)


def with_scheduler(model: nn.Module) -> Replica:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, scheduler, scheduler_per="step")


def scale_gradient(weight: nn.Parameter) -> None:
    assert weight.grad is not None
    weight.grad.mul_(1.5)


def flip_gradient(weight: nn.Parameter) -> None:
    assert weight.grad is not None
    flip_bits(weight.grad, 1, random.Random(0))


@pytest.mark.parametrize(
    ("change", "cause"), [(scale_gradient, "unreplayed-state"), (flip_gradient, "transient-fault")]
)
def test_gradient_beside_scheduler_and_logged_values(change: Callable[[nn.Parameter], None], cause: str) -> None:
    findings, differing = findings_on(hooks_gradient(change), build=with_scheduler, body=Logging)
    assert differing[0] == "gradients"
    assert cause_of(findings) == cause
