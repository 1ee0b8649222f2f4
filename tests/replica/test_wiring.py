"""check_wiring: every trap that makes a run train nothing, or something else than one thinks."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dreplica
from dreplica.replica.wiring import WiringError, check_wiring

schedulers = torch.optim.lr_scheduler


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def bytes_of(model: nn.Module) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


def fault(model: nn.Module, optimizer: torch.optim.Optimizer | None, scheduler: object = None) -> WiringError:
    with pytest.raises(WiringError) as caught:
        dreplica.check_wiring(model, optimizer, scheduler)
    assert str(caught.value) == caught.value.message
    assert caught.value.remedy
    return caught.value


class Holder(nn.Module):
    """Registers the tensors given as parameters and buffers."""

    def __init__(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)


# ---- optimizer-not-bound


def test_a_deep_copied_optimizer_is_over_orphans_and_trains_neither_model() -> None:
    original = make_model()
    optimizer = sgd(original)
    model, copied = copy.deepcopy(original), copy.deepcopy(optimizer)
    before = bytes_of(original), bytes_of(model)
    for each in (original, model):
        copied.zero_grad()
        each(torch.ones(5, 4)).sum().backward()
        copied.step()
    assert (bytes_of(original), bytes_of(model)) == before
    # Even with gradients of its own, what it moves are the orphans.
    for parameter in copied.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    copied.step()
    assert (bytes_of(original), bytes_of(model)) == before

    for each in (original, model):
        error = fault(each, copied)
        assert error.cause == "optimizer-not-bound"
        assert "6 of the 6 parameters" in error.message
        assert "copy.deepcopy(optimizer)" in error.message
        assert any("copy.deepcopy((model, optimizer))" in line for line in error.remedy)


def test_model_and_optimizer_copied_in_one_call_are_right() -> None:
    model = make_model()
    check_wiring(*copy.deepcopy((model, sgd(model))))


@pytest.mark.parametrize("num_outputs", [2, 7])
def test_an_optimizer_from_before_the_head_was_replaced_holds_some_orphans(num_outputs: int) -> None:
    model = make_model()
    optimizer = sgd(model)
    model[3] = nn.Linear(3, num_outputs)
    error = fault(model, optimizer)
    assert error.cause == "optimizer-not-bound"
    assert "2 of the 6 parameters" in error.message
    # Not a deep copy, also where the new head has the old one's shape.
    assert "replaced" in error.message
    assert "deepcopy" not in error.message
    assert "after the model is final" in error.remedy[0]


def test_the_optimizer_of_another_instance() -> None:
    assert fault(make_model(), sgd(make_model())).cause == "optimizer-not-bound"


def test_a_deep_copied_model_with_the_old_optimizer() -> None:
    model = make_model()
    optimizer = sgd(model)
    error = fault(copy.deepcopy(model), optimizer)
    assert error.cause == "optimizer-not-bound"
    assert "model or the optimizer was deep-copied by itself" in error.message


def test_the_optimizer_of_another_model() -> None:
    error = fault(make_model(), sgd(nn.Linear(9, 9)))
    assert error.cause == "optimizer-not-bound"
    assert "made for another model" in error.message


class Scaled(nn.CrossEntropyLoss):
    """A loss with a weight to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_an_optimizer_may_train_the_criterion_too() -> None:
    model, criterion = make_model(), Scaled()
    check_wiring(model, torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1), None, criterion)
    check_wiring(model, sgd(model), None, criterion)


def test_another_criterions_parameters_are_orphans() -> None:
    model = make_model()
    optimizer = torch.optim.SGD([*model.parameters(), *Scaled().parameters()], lr=0.1)
    for criterion in (None, Scaled(), nn.CrossEntropyLoss()):
        with pytest.raises(WiringError, match="1 of the 7 parameters") as caught:
            check_wiring(model, optimizer, None, criterion)
        assert caught.value.cause == "optimizer-not-bound"


# ---- parameters-not-optimized


def test_a_trainable_parameter_in_no_group() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(list(model.parameters())[:-1], lr=0.1)
    error = fault(model, optimizer)
    assert error.cause == "parameters-not-optimized"
    assert error.tensor == "3.bias"
    assert "'3.bias'" in error.message
    assert "requires_grad_(False)" in error.remedy[1]


def test_a_layer_added_after_the_optimizer_was_made() -> None:
    model = make_model()
    optimizer = sgd(model)
    model.append(nn.Linear(2, 2))
    assert fault(model, optimizer).tensor == "4.weight"


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_of_the_criterion_twice() -> None:
    model, criterion = make_model(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), criterion.scale, criterion.scale], lr=0.1)
    with pytest.raises(WiringError) as caught:
        check_wiring(model, optimizer, None, criterion)
    assert (caught.value.cause, caught.value.tensor) == ("parameters-not-optimized", "criterion.scale")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_one_group() -> None:
    model = make_model()
    error = fault(model, torch.optim.SGD([*model.parameters(), model[3].weight], lr=0.1))
    assert error.cause == "parameters-not-optimized"
    assert error.tensor == "3.weight"
    assert "more than once" in error.message


def test_a_parameter_in_two_groups() -> None:
    # add_param_group refuses it, a hand-made group does not.
    model = make_model()
    optimizer = sgd(model)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model[0].weight]})
    assert fault(model, optimizer).tensor == "0.weight"


@pytest.mark.parametrize("held", [True, False])
def test_a_frozen_trunk_is_fine_in_the_optimizer_or_not(held: bool) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    check_wiring(model, sgd(model if held else nn.Sequential(*model[1:])))


def test_tied_weights_are_fine() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    check_wiring(model, sgd(model))


def test_without_an_optimizer_only_memory_is_checked() -> None:
    check_wiring(make_model(), None)


# ---- scheduler-not-bound


def chained(optimizer: torch.optim.Optimizer) -> schedulers.ChainedScheduler:
    return schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)], optimizer
    )


def sequential(optimizer: torch.optim.Optimizer) -> schedulers.SequentialLR:
    parts = [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


def nested(optimizer: torch.optim.Optimizer) -> schedulers.ChainedScheduler:
    return schedulers.ChainedScheduler([sequential(optimizer)], optimizer)


def plateau(optimizer: torch.optim.Optimizer) -> schedulers.ReduceLROnPlateau:
    return schedulers.ReduceLROnPlateau(optimizer)


def step_lr(optimizer: torch.optim.Optimizer) -> schedulers.StepLR:
    return schedulers.StepLR(optimizer, 1)


@pytest.mark.parametrize("make", [step_lr, chained, sequential, nested, plateau])
def test_a_scheduler_of_the_right_and_of_the_wrong_optimizer(make: Callable[[torch.optim.Optimizer], object]) -> None:
    model = make_model()
    optimizer = sgd(model)
    check_wiring(model, optimizer, make(optimizer))
    for wrong in (make(sgd(model)), copy.deepcopy(make(optimizer))):
        error = fault(model, optimizer, wrong)
        assert error.cause == "scheduler-not-bound"
        assert "copy.deepcopy(scheduler)" in error.message
        assert "optimizer" in error.remedy[0]


def test_a_part_that_drives_another_optimizer_under_a_whole_that_does_not() -> None:
    model = make_model()
    optimizer = sgd(model)
    scheduler = chained(optimizer)
    scheduler._schedulers[1] = schedulers.ExponentialLR(sgd(model), 0.9)
    error = fault(model, optimizer, scheduler)
    assert error.cause == "scheduler-not-bound"
    assert "ExponentialLR" in error.remedy[0]


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step")
def test_a_deep_copied_scheduler_drives_neither_optimizer() -> None:
    model = make_model()
    optimizer = sgd(model)
    copied = copy.deepcopy(schedulers.ExponentialLR(optimizer, 0.5))
    assert copied.optimizer is not optimizer
    optimizer.step()
    copied.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_no_scheduler_and_a_scheduler_without_an_optimizer_are_fine() -> None:
    model = make_model()
    check_wiring(model, sgd(model), None)
    check_wiring(model, sgd(model), object())


# ---- storage-shared

BASE = torch.arange(24, dtype=torch.float32)
MATRIX = BASE.view(4, 6)

SHARED = {
    "the same view twice": Holder({"a": BASE[:4], "b": BASE[:4]}),
    "overlap by one element": Holder({"a": BASE[:5], "b": BASE[4:9]}),
    "one inside the other": Holder({"a": BASE[10:12], "b": BASE}),
    "inside, with another between": Holder({"a": BASE, "b": torch.zeros(0), "c": BASE[20:]}),
    "a transposed view": Holder({"a": MATRIX, "b": MATRIX.t()}),
    "another dtype": Holder({"a": BASE[:4], "b": BASE.view(torch.bfloat16)[6:9]}),
    "a column and a row": Holder({"a": MATRIX[:, 2], "b": MATRIX[1]}),
    "overlapping columns": Holder({"a": MATRIX[:, :3], "b": MATRIX[:, 2:4]}),
    "the same column": Holder({"a": MATRIX[:, 1], "b": MATRIX[:, 1]}),
    "columns, another dense one between": Holder({"a": MATRIX[:, 0], "b": MATRIX[0, 1:3], "c": MATRIX[1:, 0]}),
    "two buffers": Holder({}, {"a": BASE[:4], "b": BASE[2:]}),
    "a parameter and a buffer": Holder({"a": BASE[:4]}, {"b": BASE[:4]}),
    "an expanded buffer": Holder({"a": BASE[:4]}, {"b": BASE[2:3].expand(3, 5)}),
}


@pytest.mark.parametrize("model", SHARED.values(), ids=SHARED.keys())
def test_overlapping_memory_is_a_fault(model: nn.Module) -> None:
    error = fault(model, None)
    assert error.cause == "storage-shared"
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert error.tensor in names
    assert sum(f"'{name}'" in error.message for name in names) == 2
    assert "clone()" in error.remedy[1]


def tied_as_buffer() -> nn.Module:
    parameter = nn.Parameter(BASE[:4])
    return Holder({"a": parameter}, {"b": parameter})


APART = {
    "neighbours in one storage": Holder({"a": BASE[:4], "b": BASE[4:8], "c": BASE[8:]}),
    "neighbours in bytes": Holder({"a": BASE[:4], "b": BASE.view(torch.bfloat16)[8:9]}),
    "interleaved": Holder({"a": BASE[0::2], "b": BASE[1::2]}),
    "columns of one matrix": Holder({"a": MATRIX[:, :2], "b": MATRIX[:, 2:5], "c": MATRIX[:, 5]}),
    "a dense one in another's gap": Holder({"a": MATRIX[:, 0], "b": MATRIX[1, 1:6]}),
    "channels_last": nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
    "meta": Holder({"a": torch.empty(3, device="meta"), "b": torch.empty(3, device="meta"), "c": BASE}),
    "empty": Holder({"a": torch.empty(0), "b": BASE[:0], "c": BASE[4:4], "d": BASE}),
    "lazy": nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(2)),
    "sparse": Holder({"a": torch.eye(3).to_sparse(), "b": torch.eye(3).to_sparse()}),
    "an expanded buffer of its own": Holder({"a": BASE}, {"b": torch.zeros(1).expand(4, 4)}),
    "one tensor as parameter and buffer": tied_as_buffer(),
    "recurrent": nn.LSTM(3, 4, num_layers=2, bidirectional=True),
}


@pytest.mark.parametrize("model", APART.values(), ids=APART.keys())
def test_memory_of_ones_own_is_fine(model: nn.Module) -> None:
    check_wiring(model, None)


def test_flat_recurrent_weights_are_views_of_one_storage_and_fine() -> None:
    # As cuDNN lays them out; on the CPU flatten_parameters does nothing, so this does it by hand.
    model = nn.GRU(3, 4)
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    offset = 0
    for parameter in model.parameters():
        parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    check_wiring(model, sgd(model))


@pytest.mark.gpu
def test_addresses_on_different_devices_do_not_collide() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3).cuda())
    check_wiring(model, sgd(model))


# ---- the error itself


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="model: a list will not do: give one; of several models, check each with its"):
        check_wiring([model], sgd(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer: a dict will not do: give one"):
        check_wiring(model, {"one": sgd(model)})  # type: ignore[arg-type]


def test_the_error_survives_pickling_since_it_crosses_processes() -> None:
    error = fault(make_model(), sgd(make_model()))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is WiringError
    assert isinstance(again, ValueError)
    assert (str(again), again.cause, again.tensor, again.remedy) == (
        str(error),
        "optimizer-not-bound",
        None,
        error.remedy,
    )
