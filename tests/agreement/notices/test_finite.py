"""Warnings about NaN and infinity: named after the build and at the first loss, and no other."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreplica.agreement.notices.finite import LossWatch, warn_of_values
from tests.agreement.notices.loop import codes, make_model, train


def plant(parameter: Tensor, value: float, count: int = 1) -> None:
    with torch.no_grad():
        parameter.view(-1)[:count] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_parameter_that_is_not_finite_after_build(value: float, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    plant(model[2].weight, value, count=2)
    plant(model[2].bias, value)
    (found,) = warn_of_values(model, 0)
    counts = (2, 0) if math.isnan(value) else (0, 2)
    assert (found.code, found.data["tensor"]) == ("not-finite", "2.weight")
    assert (found.data["num_nan"], found.data["num_infinite"], found.data["num_elements"]) == (*counts, 48)
    assert found.data["tensors"] == ["2.weight", "2.bias"]
    assert "after the build, and so have 1 more" in found.text


def test_memory_never_written_is_named_by_agreement() -> None:
    """In deterministic mode, torch.empty is filled with NaN, on which all replicas agree."""
    model = make_model()
    torch.use_deterministic_algorithms(True)
    try:
        model.scale = nn.Parameter(torch.empty(5))
    finally:
        torch.use_deterministic_algorithms(False)
    agreement = train(model, steps=1)
    (found,) = agreement.warnings
    assert (found.code, found.data["tensor"], found.data["num_nan"]) == ("not-finite", "scale", 5)
    assert "torch.empty" in found.text


def masked() -> nn.Module:
    model = make_model()
    model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    model.register_buffer("smallest", torch.tensor(math.inf))
    return model


def overflowing() -> nn.Module:
    """Return a model with finite values whose sum is infinite."""
    model = make_model()
    plant(model[0].weight, 3e38, count=8)
    return model


def unusual() -> nn.Module:
    model = make_model()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("numbers", torch.arange(3))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
    model.register_buffer("narrow", torch.ones(3).to(torch.float8_e4m3fn))
    return model


@pytest.mark.parametrize("make", [make_model, masked, overflowing, unusual, lambda: nn.BatchNorm2d(3)])
def test_usual_values_give_no_warning(make: Callable[[], nn.Module]) -> None:
    assert [*warn_of_values(make(), 0)] == []


def nan_in_buffer(model: Any) -> str:
    model.register_buffer("table", torch.tensor([1.0, math.nan]))
    return "table"


def infinite_statistics(model: Any) -> str:
    model.append(nn.BatchNorm1d(3))
    model[3].running_var[1] = math.inf
    return "3.running_var"


def nan_in_float8(model: Any) -> str:
    model.register_buffer("narrow", torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn))
    return "narrow"


def nan_in_complex(model: Any) -> str:
    model.register_buffer("phase", torch.tensor([complex(0, math.nan)]))
    return "phase"


@pytest.mark.parametrize("change", [nan_in_buffer, infinite_statistics, nan_in_float8, nan_in_complex])
def test_buffer_that_is_not_finite(change: Callable[[Any], str]) -> None:
    model = make_model()
    name = change(model)
    (found,) = warn_of_values(model, 0)
    assert (found.data["kind"], found.data["tensor"]) == ("buffer", name)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_first_loss_that_is_not_finite(factor: float) -> None:
    agreement = train(change_loss=lambda step, loss: loss * factor if step >= 7 else loss)
    (found,) = agreement.warnings
    assert (found.code, found.data["step"]) == ("loss-not-finite", 7)
    assert found.data["value"] == ("NaN" if math.isnan(factor) else "inf")


def test_weights_not_finite_at_the_end_without_losses() -> None:
    """A trainer may pass no loss to its callback."""
    model = make_model()
    agreement = train(model, after_step=lambda step: plant(model[0].bias, math.nan) if step == 29 else None, steps=29)
    assert codes(agreement) == ["not-finite"]
    assert "after step 29" in agreement.warnings[0].text


@pytest.mark.parametrize("step", [1, 31, 32, 33, 64, 70])
def test_losses_on_device_are_checked_in_windows(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `item`, which waits for the device, until the loop ends."""
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda _: False))
    watch = LossWatch()
    found: list[Any] = []
    with monkeypatch.context() as context:
        context.setattr(Tensor, "item", None)
        for number in range(1, 75):
            loss = torch.tensor(math.nan if number >= step else 1.0)
            found += watch.step(number, loss)
            loss.fill_(1.0)  # a captured graph overwrites it
    assert len(found) == (step <= 64)
    found += watch.finish()
    assert [(each.code, each.data["step"]) for each in found] == [("loss-not-finite", step)]


@pytest.mark.gpu
def test_losses_on_gpu_do_not_synchronize() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    watch = LossWatch()
    losses = [torch.tensor(math.nan if number == 40 else 1.0, device="cuda") for number in range(1, 80)]
    found = [*watch.step(1, losses[0])]  # allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, loss in enumerate(losses[1:], start=2):
            found += watch.step(number, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += watch.finish()
    assert [each.data["step"] for each in found] == [40]
