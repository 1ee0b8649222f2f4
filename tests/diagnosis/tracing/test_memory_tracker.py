"""MemoryTracker: who wrote the memory that an operator reads, and what of it was never written."""

from collections.abc import Callable

import numpy
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dreplica.diagnosis.tracing.memory_tracker import OUTSIDE, STATE
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def traced(step: Callable[[], object]) -> list[OpRecord]:
    with OpTracer(state=[X]) as tracer:
        step()
    return tracer.records


def half(memory: Tensor) -> Tensor:
    memory[:, :2] = X[:, :2]
    return memory


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3, 4),
        lambda: torch.empty_like(X),
        lambda: X.new_empty(3, 4),
        lambda: torch.empty_strided((3, 4), (4, 1)),
        lambda: torch.empty(0).resize_(3, 4),
    ],
)
def test_unwritten_part_is_found(allocate: Callable[[], Tensor]) -> None:
    last = traced(lambda: half(allocate()) + 1)[-1]
    assert [(each.elements, each.total) for each in last.unwritten] == [(6, 12)]


@pytest.mark.parametrize(
    "write",
    [
        lambda memory: memory.copy_(X),
        lambda memory: memory.zero_(),
        lambda memory: memory.uniform_(),
        lambda memory: torch.mul(X, 2, out=memory),
        lambda memory: [row.copy_(X[0]) for row in memory],
        lambda memory: memory.view(12).fill_(3),
        lambda memory: memory.numpy().__setitem__(
            slice(None), numpy.random.default_rng().random((3, 4))
        ),  # new numbers
        lambda memory: torch._foreach_copy_([memory], [X]),
    ],
)
def test_written_memory_is_not_reported(write: Callable[[Tensor], object]) -> None:
    def step() -> None:
        memory = torch.empty(3, 4)
        numpy.copyto(memory.numpy(), -5.0)  # other than any of what is written
        write(memory)
        memory + 1

    def fresh() -> None:
        memory = torch.empty(3, 4)
        write(memory)
        memory + 1

    assert not any(record.unwritten for step in (step, fresh) for record in traced(step)[-1:])


def test_resized_tensor_keeps_its_contents() -> None:
    kept = torch.ones(8)
    assert not traced(lambda: kept.resize_(4) + 1)[-1].unwritten


def test_partly_written_by_index() -> None:
    def step() -> None:
        memory = torch.empty(3, 4)
        memory.index_copy_(0, torch.tensor([1]), X[:1] + 9)
        memory + 1

    (left,) = traced(step)[-1].unwritten
    assert left.elements == 8


def test_origins_are_state_operator_and_outside() -> None:
    other = torch.ones(3, 4)
    records = traced(lambda: (X * 2) + other)
    assert [record.origins for record in records] == [(STATE,), (0, OUTSIDE)]


def test_freed_memory_is_not_taken_for_another() -> None:
    def step() -> None:
        for _ in range(20):
            X * 2
        X + torch.from_numpy(numpy.ones(4, dtype=numpy.float32)).view(4)

    origins = traced(step)[-1].origins
    assert origins[0] == STATE
    assert origins[1] >= 20  # the tensor that NumPy's data became, not a freed product


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


IMAGES, WORDS = (2, 3, 32, 32), (2, 5, 8)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: torchvision.models.resnet18(num_classes=4), IMAGES),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), WORDS),
        (Attention, WORDS),
        (Recurrent, WORDS),
        (Checkpointed, WORDS),
    ],
)
def test_sound_models_read_nothing_unwritten(make: Callable[[], nn.Module], shape: tuple[int, ...], amp: bool) -> None:
    model, inputs = make(), torch.randn(*shape)
    if len(shape) == 4:
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    with OpTracer(optimizer, model=model) as tracer:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.mse_loss(model(inputs).float(), torch.zeros(()).expand(()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert [str(record) for record in tracer.records if record.unwritten] == []
