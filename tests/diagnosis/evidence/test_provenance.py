"""Of a sound step every tensor read or left is accounted for; of one whose memory was changed, exactly that one not."""

import random

import pytest
import torch
from torch import Tensor, nn

from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.evidence.provenance import (
    Contents,
    contents_after,
    contents_before,
    last_writer,
    left_unaccounted,
    reads_unaccounted,
)
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state
from dreplica.state.stages import optimizer_stage
from dreplica.training.corruption import flip_bits
from dreplica.training.step import training_step
from tests.fixtures import tiny_model

STAGES = ("weights", "buffers", "gradients", "optimizer")


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


def make_replica(model: nn.Module | None = None) -> Replica:
    seed_generators(3)
    model = model or tiny_model(5)
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0]))
    return Replica(model, criterion, torch.optim.AdamW(model.parameters(), lr=0.01))


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(torch.arange(8), torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5)


def traced_step(replica: Replica, step: int, config: TrainConfig | None = None) -> tuple[list[OpRecord], Contents]:
    batch = make_batch(step)
    before = contents_before(replica, batch)
    with OpTracer(replica.optimizer, model=replica.model) as tracer:
        training_step(replica, batch, config or TrainConfig())
    return tracer.records, Contents(before, contents_after(replica))


def unaccounted(records: list[OpRecord], contents: Contents) -> list[int]:
    """Operators that read something that came from nowhere.

    Of a view, shapes are recorded, in words; of a draw, the generator's state; and what `torch.tensor(0.0)` makes, as
    AdamW does in its first step, no operator has made.
    """
    kinds = ("aten.bernoulli_.", "aten.add_.Tensor")
    computing = [i for i, r in enumerate(records) if not r.inputs.startswith(b"[") and not r.name.startswith(kinds)]
    return [i for i in computing if reads_unaccounted(records, contents, i)]


@pytest.mark.parametrize("config", [{}, {"grad_clip": 0.1}, {"accumulate": 2}, {"amp": "bf16"}])
def test_a_sound_step_reads_and_leaves_nothing_unaccounted(config: dict) -> None:
    replica = make_replica()
    for step in (1, 2):
        records, contents = traced_step(replica, step, TrainConfig.model_validate(config))
        assert [str(records[i]) for i in unaccounted(records, contents)] == []
        for stage in STAGES:
            assert left_unaccounted(records, contents, stage) == []


@pytest.mark.parametrize(
    ("stage", "name"),
    [("weights", "5.weight"), ("buffers", "1.running_var"), ("gradients", "0.bias"), ("optimizer", "5.bias.exp_avg")],
)
def test_what_was_changed_behind_the_operators_backs_is_named(stage: str, name: str) -> None:
    replica = make_replica()

    def strike(*_: object) -> None:
        model = replica.model
        parameters = dict(model.named_parameters())
        tensor: Tensor = {
            "weights": lambda: parameters["5.weight"],
            "buffers": lambda: dict(model.named_buffers())["1.running_var"],
            "gradients": lambda: parameters["0.bias"].grad,
            "optimizer": lambda: replica.optimizer.state[parameters["5.bias"]]["exp_avg"],
        }[stage]()
        flip_bits(tensor, 1, random.Random(0))

    replica.optimizer.register_step_post_hook(strike)
    records, contents = traced_step(replica, 1)
    assert left_unaccounted(records, contents, stage) == [name]
    for other in set(STAGES) - {stage}:
        assert left_unaccounted(records, contents, other) == []


def test_operator_reading_corruption_is_first_unaccounted() -> None:
    replica = make_replica()
    replica.model[0].register_forward_hook(lambda _m, _a, output: flip_bits(output, 1, random.Random(0)))
    sound, _ = traced_step(make_replica(), 1)
    records, contents = traced_step(replica, 1)
    corrupted = next(i for i, (a, b) in enumerate(zip(sound, records, strict=True)) if a.inputs != b.inputs)
    assert records[corrupted].name == "aten.native_batch_norm.default"
    assert reads_unaccounted(records, contents, corrupted) == [0]
    assert unaccounted(records, contents)[0] == corrupted
    writer = last_writer(sound, corrupted, records[corrupted].inputs)
    assert writer is not None
    assert str(sound[writer]) == "aten.convolution.default in 0 (forward)"


def test_what_this_step_did_not_write_has_no_writer() -> None:
    replica = make_replica()
    sound, _ = traced_step(replica, 1)
    conv = next(i for i, record in enumerate(sound) if "convolution.default" in record.name)
    inputs = sound[conv].inputs
    assert last_writer(sound, conv, bytes(16) + inputs[16:]) is None  # the images
    assert last_writer(sound, conv, inputs) is None  # nothing differs


def test_the_criterions_tensors_and_the_batch_are_the_steps_own() -> None:
    replica, batch = make_replica(), make_batch(1)
    before = contents_before(replica, batch)
    shifted = contents_before(replica, make_batch(2))
    assert len(before - shifted) == 1  # the inputs; labels are the same
    replica.criterion.weight[0] += 1.0
    assert len(before - contents_before(replica, batch)) == 1
    replica.model[5].bias.grad = torch.full((5,), 7.0)
    after = contents_after(replica)
    assert list(after["gradients"]) == ["5.bias"]
    assert after["gradients"]["5.bias"] not in contents_before(replica, batch)  # gradients are zeroed first


def test_optimizer_tensors_have_the_names_of_the_stage() -> None:
    model, criterion = nn.Linear(2, 2), nn.PReLU(2)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1, momentum=0.9)
    for parameter in [*model.parameters(), *criterion.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    named = set(contents_after(Replica(model, criterion, optimizer))["optimizer"])
    assert named == {
        "weight.momentum_buffer",
        "bias.momentum_buffer",
        "group0.params.2",
        "group0.params.2.momentum_buffer",
    }
    assert named < set(optimizer_stage(model, optimizer).entries())
