"""A last batch of one sample, and BatchNorm: told before the first step, and only where it would fail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dreplica.config.schema import RunConfig
from dreplica.data.samples import TensorImages
from dreplica.errors import UsageError
from dreplica.state.rng import seed_generators
from dreplica.training.preflight import check_smallest_part, smallest_part

CPU = torch.device("cpu")


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 8), st.none() | st.integers(1, 8))
def test_smallest_part_of_taken_batches(
    num_samples: int, batch_size: int, accumulate: int, max_steps: int | None
) -> None:
    batches = torch.arange(num_samples).split(batch_size)[:max_steps]
    parts = [len(part) for batch in batches for part in batch.chunk(min(accumulate, len(batch)))]
    assert smallest_part(num_samples, batch_size, accumulate, max_steps) == min(parts)


def fails() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 5))


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))


def wide_enough() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5))


def normless() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))


def check(model: nn.Module, num_samples: int, **sections: Any) -> None:
    images = TensorImages(torch.randn(num_samples, 3, 2, 2), torch.zeros(num_samples, dtype=torch.int64))
    check_smallest_part(model, images, RunConfig.model_validate(sections), CPU)


@pytest.mark.parametrize("make", [fails, pooled])
@pytest.mark.parametrize(
    ("num_samples", "sections"),
    [
        (9, {"data": {"batch_size": 4}}),
        (9, {"data": {"batch_size": 1}}),
        (1, {"data": {"batch_size": 4}}),
        (8, {"data": {"batch_size": 4}, "train": {"accumulate": 4}}),
        (9, {"data": {"batch_size": 4}, "train": {"max_steps": 3}}),
    ],
)
def test_single_sample_batch_is_usage_error(
    make: Callable[[], nn.Module], num_samples: int, sections: dict[str, Any]
) -> None:
    seed_generators(1)
    model = make().train()
    before = [buffer.numpy().tobytes() for buffer in model.buffers()]
    with pytest.raises(
        UsageError, match=rf"^data\.batch_size: .*{num_samples} samples.*BatchNorm.*more than one value"
    ):
        check(model, num_samples, **sections)
    assert [buffer.numpy().tobytes() for buffer in model.buffers()] == before
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("make", "num_samples", "sections"),
    [
        (wide_enough, 9, {"data": {"batch_size": 4}}),
        (normless, 9, {"data": {"batch_size": 4}}),
        (fails, 8, {"data": {"batch_size": 4}}),
        (fails, 10, {"data": {"batch_size": 4}}),
        (fails, 9, {"data": {"batch_size": 4}, "train": {"max_steps": 2}}),
        (fails, 8, {"data": {"batch_size": 4}, "train": {"accumulate": 2}}),
    ],
)
def test_valid_batch_sizes_pass(make: Callable[[], nn.Module], num_samples: int, sections: dict[str, Any]) -> None:
    model = make().train()
    buffers = [buffer.numpy().tobytes() for buffer in model.buffers()]
    images = TensorImages(torch.randn(num_samples, 3, 2, 2), torch.zeros(num_samples, dtype=torch.int64))
    before = torch.get_rng_state()
    check_smallest_part(model, images, RunConfig.model_validate(sections), CPU)
    assert torch.get_rng_state().numpy().tobytes() == before.numpy().tobytes()
    assert [buffer.numpy().tobytes() for buffer in model.buffers()] == buffers


def test_batch_norm_in_eval_mode_passes() -> None:
    model = fails().train()
    model[2].eval()
    check(model, 9, data={"batch_size": 4})
