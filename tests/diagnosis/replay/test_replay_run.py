"""A replay leaves the replica byte for byte unchanged, and reproduces the digest that was compared."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.protocol import CombinedDigest, fold
from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.evidence.aftermath import compare_tensors
from dreplica.diagnosis.evidence.tensor_diff import Difference
from dreplica.diagnosis.replay.replay_run import Load, Replayer
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state
from dreplica.state.stages import STAGES, Stage
from dreplica.training.history import History, StepEntry
from dreplica.training.step import training_step
from tests.fixtures import tiny_model

schedulers = torch.optim.lr_scheduler
NUM_STEPS, STEPS_PER_EPOCH = 5, 2


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


class Noisy(nn.Module):
    """`tiny_model`, which has dropout, with draws from Python's and NumPy's global generators."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_model(5)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images * (1.0 + random.random())) + float(numpy.random.rand())


def with_momentum(model: nn.Module) -> Replica:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, schedulers.StepLR(optimizer, 1, gamma=0.5))


def with_adamw(model: nn.Module) -> Replica:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    return Replica(model, nn.CrossEntropyLoss(), optimizer, schedulers.CosineAnnealingLR(optimizer, 4))


def with_scaler(model: nn.Module) -> Replica:
    replica = with_momentum(model)
    replica.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    return replica


def without_state(model: nn.Module) -> Replica:
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))


KINDS: list[Callable[[nn.Module], Replica]] = [with_momentum, with_adamw, with_scaler, without_state]


def load(indices: Tensor, _entry: StepEntry) -> Batch:
    generator = torch.Generator().manual_seed(100 + int(indices[0]))
    return Batch(indices, torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 5)


def indices_of(step: int) -> Tensor:
    return torch.arange(6) + 6 * step


@dataclass
class Trained:
    """A replica some steps on, with what is needed to replay them."""

    replica: Replica
    history: History
    agreement: Agreement
    stages: dict[int, dict[str, Stage]]

    def replayer(self, load: Load = load) -> Replayer:
        return Replayer(
            self.replica, self.history, lambda entry: indices_of(entry.step), load, TrainConfig(), self.agreement
        )


def train(kind: Callable[[nn.Module], Replica], every: int = 50, compared: Callable[[int], bool] = bool) -> Trained:
    """`NUM_STEPS` steps; the word of those for which `compared` holds is kept."""
    seed_generators(3)
    replica = kind(Noisy())
    agreement = Agreement(replica.model, replica.optimizer, others=[replica.scheduler, replica.scaler])
    history = History(replica, every)
    stages = {}
    for step in range(1, NUM_STEPS + 1):
        entry = StepEntry(step, 1 + step // STEPS_PER_EPOCH, step - 1, indices_of(step), None)
        batch = load(entry.indices, entry)
        output = training_step(replica, batch, TrainConfig())
        stages[step] = agreement.observe(
            indices=batch.indices, batch=(batch.inputs, batch.labels), outputs=output.logits, loss=output.loss
        )
        word = CombinedDigest(partial(fold, step, stages[step])) if compared(step) else None
        history.step(replace(entry, word=word), step)
        if step % STEPS_PER_EPOCH == 0:
            if replica.scheduler is not None:
                replica.scheduler.step()
            history.epoch_end(step // STEPS_PER_EPOCH)
    return Trained(replica, history, agreement, stages)


def frozen(value: Any) -> Any:
    """Return nested state with tensors as bytes and everything else unchanged."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return value.tobytes() if isinstance(value, numpy.ndarray) else value


def everything(replica: Replica) -> dict[str, Any]:
    """All that a step reads or writes."""
    model = replica.model
    others = [other.state_dict() for other in (replica.scheduler, replica.scaler) if other is not None]
    return frozen(
        {
            "weights": dict(model.named_parameters()),
            "buffers": dict(model.named_buffers()),
            "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
            "optimizer": replica.optimizer.state_dict(),
            "others": others,
            "python": random.getstate(),
            "numpy": numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "modes": {name: module.training for name, module in model.named_modules()},
            "steps_done": replica.steps_done,
            "memory": [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]],
        }
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [50, 2])
def test_close_restores_every_byte(kind: Callable[[nn.Module], Replica], every: int) -> None:
    trained = train(kind, every)
    replica = trained.replica
    replica.model.eval()
    replica.model.body[4].train()
    random.random(), numpy.random.rand(), torch.rand(1)
    before = everything(replica)
    replayer = trained.replayer()
    step = trained.history.snapshot.steps_done + 1
    assert replayer.approach(step) is None
    during = everything(replica)
    assert {key for key in during if during[key] != before[key]} >= {"weights", "gradients", "torch", "modes"}
    replayer.again(replayer.indices())
    replayer.again(replayer.indices(), capture=2)
    replayer.close()
    after = everything(replica)
    for key in before:
        assert after[key] == before[key], key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 3, NUM_STEPS])
def test_replay_equals_original_step(kind: Callable[[nn.Module], Replica], step: int) -> None:
    trained = train(kind)
    replayer = trained.replayer()
    assert replayer.approach(step) is None
    for _ in range(2):
        replayed = replayer.again(replayer.indices())
        assert set(replayed.stages) == set(STAGES) - {"predictions"}
        assert replayed.stages == trained.stages[step]
        assert fold(step, replayed.stages) == fold(step, trained.stages[step])
        assert replayed.generator == torch.get_rng_state().numpy().tobytes()
    replayer.close()


def test_training_after_replay_is_unchanged() -> None:
    ends = []
    for replayed in (False, True):
        trained = train(with_adamw)
        if replayed:
            replayer = trained.replayer()
            replayer.approach(2)
            replayer.again(replayer.indices())
            replayer.close()
        training_step(trained.replica, load(indices_of(9), 9), TrainConfig())
        state = everything(trained.replica)
        ends.append({key: value for key, value in state.items() if key != "memory"})
    assert ends[0] == ends[1]


@pytest.mark.parametrize("wrong_at", [1, 3])
def test_approach_reports_first_differing_step(wrong_at: int) -> None:
    trained = train(with_momentum)
    entries = trained.history.entries
    for number, entry in enumerate(entries):
        if isinstance(entry, StepEntry) and entry.step in (wrong_at, wrong_at + 1):
            entries[number] = replace(entry, word=CombinedDigest(lambda: bytes(16)))
    replayer = trained.replayer()
    assert replayer.approach(NUM_STEPS) == wrong_at
    assert replayer.approach(wrong_at) is None
    replayer.close()


def test_approach_reports_step_with_foreign_draw() -> None:
    """The data differs each time: the recorded digests are right, the replay is not."""
    trained = train(with_momentum)
    entropy = random.SystemRandom()

    def other(indices: Tensor, entry: StepEntry) -> Batch:
        batch = load(indices, entry)
        return batch if entry.step != 2 else replace(batch, inputs=batch.inputs + entropy.random())

    replayer = trained.replayer(other)
    assert replayer.approach(4) == 2
    assert replayer.approach(2) is None
    replayer.close()


def test_approach_skips_steps_not_compared() -> None:
    trained = train(with_momentum, compared=lambda step: step == NUM_STEPS)
    replayer = trained.replayer()
    assert replayer.approach(NUM_STEPS) is None
    assert replayer.again(replayer.indices()).stages == trained.stages[NUM_STEPS]
    replayer.close()


def test_original_has_the_state_of_the_newest_step_only() -> None:
    trained = train(with_momentum)
    with torch.no_grad():
        trained.replica.model.body[5].weight[0, 0] += 1.0
    replayer = trained.replayer()
    replayer.approach(NUM_STEPS)
    original, (stages, replayed) = replayer.original(), replayer.untraced(replayer.indices())
    assert stages == trained.stages[NUM_STEPS]
    for stage in ("gradients", "optimizer", "buffers"):
        assert not compare_tensors(original.tensors[stage], replayed.tensors[stage])
    (difference,) = compare_tensors(original.tensors["weights"], replayed.tensors["weights"]).values()
    assert isinstance(difference, Difference)
    assert (difference.num_differing, difference.first_index) == (1, (0, 0))
    replayer.approach(2)
    assert replayer.original().tensors == {}, "step 5 has overwritten it"
    replayer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_alone_makes_the_weights_of_the_step(kind: Callable[[nn.Module], Replica]) -> None:
    trained = train(kind)
    replayer = trained.replayer()
    replayer.approach(NUM_STEPS)
    _, replayed = replayer.untraced(replayer.indices())
    alone = replayer.optimize(replayed.tensors["gradients"])
    for stage in ("weights", "optimizer"):
        assert not compare_tensors(replayed.tensors[stage], alone.tensors[stage])
    changed = replayer.optimize(replayed.tensors["gradients"], changed="body.5.bias")
    assert list(compare_tensors(replayed.tensors["weights"], changed.tensors["weights"])) == ["body.5.bias"]
    replayer.close()


class Moody(Noisy):
    """Counts its training steps, freezes its BatchNorm at the second, and draws in evaluations, too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.training and self.calls == 2:
            self.body[1].eval()
        return super().forward(images) * (1 + 0.01 * self.calls)


@pytest.mark.parametrize("every", [50, 2])
def test_approach_follows_evaluations_and_modes(every: int) -> None:
    seed_generators(3)
    replica = with_momentum(Moody())
    agreement = Agreement(replica.model, replica.optimizer)
    history = History(replica, every)
    stages = {}
    for step in range(1, 8):
        number = (step - 1) % 3
        if number == 0:
            replica.model.train()
        entry = StepEntry(step, 1 + (step - 1) // 3, number, indices_of(step), None)
        batch = load(entry.indices, entry)
        output = training_step(replica, batch, TrainConfig())
        stages[step] = agreement.observe(
            indices=batch.indices, batch=(batch.inputs, batch.labels), outputs=output.logits, loss=output.loss
        )
        history.step(replace(entry, word=CombinedDigest(partial(fold, step, stages[step]))), step)
        if number == 2:
            modes = {module: module.training for module in replica.model.modules()}
            replica.model.eval()
            replica.model(batch.inputs)
            for module, training in modes.items():
                module.training = training
            history.evaluated()
    before, calls = everything(replica), replica.model.calls
    replayer = Replayer(replica, history, lambda entry: indices_of(entry.step), load, TrainConfig(), agreement)
    assert replayer.approach(7) is None
    assert replayer.again(replayer.indices()).stages == stages[7]
    replayer.close()
    assert everything(replica) == before
    assert replica.model.calls == calls
