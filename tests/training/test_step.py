"""One step: bit for bit a textbook loop's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreplica.config.schema import TrainConfig
from dreplica.data.loading.loader import Batch
from dreplica.errors import UsageError
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.state.stages import optimizer_stage
from dreplica.training.evaluate import Tally
from dreplica.training.step import make_scaler, reduction_of, training_step
from tests.fixtures import tiny_model

CPU = torch.device("cpu")
NUM_CLASSES = 5


def make_replica(
    model: nn.Module | None = None, criterion: nn.Module | None = None, scaler: torch.amp.GradScaler | None = None
) -> Replica:
    seed_generators(3)
    model = model or tiny_model(NUM_CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return Replica(model.train(), criterion or nn.CrossEntropyLoss(), optimizer, scaler=scaler)


def without_batch_norm() -> nn.Module:
    seed_generators(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))


def batches(sizes: list[int]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in sizes:
        labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
        made.append(Batch(torch.arange(size), torch.randn(size, 3, 8, 8, generator=generator), labels))
    return made


def config(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate(values)


def bytes_of(*tensors: Tensor | None) -> list[bytes | None]:
    return [None if tensor is None else tensor.detach().contiguous().numpy().tobytes() for tensor in tensors]


def everything(replica: Replica) -> list[bytes | None]:
    """Weights, buffers, gradients, optimizer state and the generator."""
    state = [
        value for entry in replica.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)
    ]
    gradients = [parameter.grad for parameter in replica.model.parameters()]
    tensors = [*replica.model.parameters(), *replica.model.buffers(), *gradients, *state, torch.get_rng_state()]
    return bytes_of(*tensors)


def test_step_equals_textbook_loop() -> None:
    data = batches([16, 16, 5])
    replica = make_replica()
    outputs = [training_step(replica, batch, config()) for batch in data]
    left = everything(replica)

    textbook = make_replica()
    for batch, output in zip(data, outputs, strict=True):
        textbook.optimizer.zero_grad()
        logits = textbook.model(batch.inputs)
        loss = textbook.criterion(logits, batch.labels)
        loss.backward()
        textbook.optimizer.step()
        assert bytes_of(output.loss, output.logits) == bytes_of(loss, logits)
        assert not output.loss.requires_grad
        assert not output.logits.requires_grad
    assert left == everything(textbook)
    assert replica.steps_done == 3


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_equals_torch(max_norm: float) -> None:
    (batch,) = batches([16])
    replica = make_replica()
    training_step(replica, batch, config(grad_clip=max_norm))
    left = everything(replica)

    textbook = make_replica()
    textbook.criterion(textbook.model(batch.inputs), batch.labels).backward()
    norm = nn.utils.clip_grad_norm_(textbook.model.parameters(), max_norm)
    textbook.optimizer.step()
    assert bool(norm > max_norm) == (max_norm == 0.01), "one limit cuts, the other does not"
    assert left == everything(textbook)


CRITERIA = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.5, 2.0, 0.1])),
    "weights and smoothing": nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.5, 2.0, 0.1]), label_smoothing=0.1),
    "an ignored class": nn.CrossEntropyLoss(ignore_index=2),
    "margin with weights": nn.MultiMarginLoss(weight=torch.tensor([1.0, 5.0, 0.5, 2.0, 0.1])),
}


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
@pytest.mark.parametrize(("size", "parts"), [(16, 4), (16, 3), (5, 4), (7, 2)])
def test_accumulation_equals_one_step_up_to_rounding(criterion: nn.Module, size: int, parts: int) -> None:
    (batch,) = batches([size])
    whole, split = (make_replica(without_batch_norm(), criterion) for _ in "12")
    one = training_step(whole, batch, config())
    many = training_step(split, batch, config(accumulate=parts))
    assert many.loss.shape == ()
    torch.testing.assert_close(many.loss, one.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(many.logits, one.logits)
    for accumulated, expected in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(accumulated.grad, expected.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(accumulated, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 9])
def test_accumulation_with_uneven_parts(size: int) -> None:
    (batch,) = batches([size])
    forwards = []
    replica = make_replica(without_batch_norm())
    replica.model.register_forward_hook(lambda _module, inputs, _output: forwards.append(len(inputs[0])))
    output = training_step(replica, batch, config(accumulate=4))
    assert sum(forwards) == size
    assert len(forwards) <= 4
    assert output.logits.shape == (size, NUM_CLASSES)


def test_sum_reduction_is_mean_times_samples() -> None:
    (batch,) = batches([8])
    mean, total = make_replica(without_batch_norm()), make_replica(without_batch_norm(), CRITERIA["sum"])
    mean_out, sum_out = (training_step(replica, batch, config()) for replica in (mean, total))
    torch.testing.assert_close(sum_out.loss, mean_out.loss * 8)
    tallies = [Tally.zero(CPU), Tally.zero(CPU)]
    for tally, output, replica in zip(tallies, (mean_out, sum_out), (mean, total), strict=True):
        tally.add(output.loss, output.logits, batch.labels, reduction_of(replica.criterion))
    assert tallies[0].loss == pytest.approx(tallies[1].loss)
    assert tallies[0].accuracy == tallies[1].accuracy


def test_bf16_autocast_covers_forward_only() -> None:
    (batch,) = batches([16])
    replica = make_replica()
    output = training_step(replica, batch, config(amp="bf16"))
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in replica.model.parameters())
    assert make_scaler(config(amp="bf16"), CPU) is None
    assert make_scaler(config(), CPU) is None
    plain = make_replica()
    training_step(plain, batch, config())
    assert everything(replica) != everything(plain)


def fp16_replica() -> Replica:
    scaler = make_scaler(config(amp="fp16"), CPU)
    assert scaler is not None
    return make_replica(without_batch_norm(), scaler=scaler)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_fp16_scales_loss_and_unscales_gradients(clip: float | None) -> None:
    (batch,) = batches([16])
    replica = fp16_replica()
    before = copy.deepcopy(replica.model)
    output = training_step(replica, batch, config(amp="fp16", grad_clip=clip))
    assert output.logits.dtype == torch.float16
    gradients = torch.cat([parameter.grad.flatten() for parameter in replica.model.parameters()])
    plain = make_replica(before)
    plain.optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = plain.criterion(plain.model(batch.inputs), batch.labels)
    loss.backward()
    assert output.loss.item() == loss.item(), "the loss that is reported is not scaled"
    if clip is not None:
        nn.utils.clip_grad_norm_(plain.model.parameters(), clip)
        assert float(gradients.norm()) == pytest.approx(clip, rel=1e-3)
    expected = torch.cat([parameter.grad.flatten() for parameter in plain.model.parameters()])
    torch.testing.assert_close(gradients, expected, rtol=1e-2, atol=1e-4)


def test_fp16_overflow_skips_step() -> None:
    (batch,) = batches([16])
    replica = fp16_replica()

    def stage() -> dict[str, bytes]:
        return optimizer_stage(replica.model, replica.optimizer, replica.scaler).entries()

    names = [name for name in stage() if "scale" in name.lower()]
    assert names
    weights = bytes_of(*replica.model.parameters())
    training_step(replica, Batch(batch.indices, batch.inputs * 1e6, batch.labels), config(amp="fp16"))
    assert bytes_of(*replica.model.parameters()) == weights
    scale = replica.scaler.get_scale()
    before = stage()
    training_step(replica, Batch(batch.indices, batch.inputs * 1e6, batch.labels), config(amp="fp16"))
    assert replica.scaler.get_scale() == scale / 2
    assert any(stage()[name] != before[name] for name in names)


@pytest.mark.parametrize("logits", [None, {"logits": torch.zeros(4, 5)}, torch.zeros(3, 5), torch.zeros(())])
def test_model_without_logits_is_usage_error(logits: Any) -> None:
    class Gives(nn.Linear):
        def forward(self, _inputs: Tensor) -> Any:
            return logits

    with pytest.raises(
        UsageError, match=r"^model\.factory: expected a model that returns logits, .* for a batch of 4, got "
    ):
        training_step(make_replica(Gives(2, 2)), batches([4])[0], config())
