"""Tests of check_wiring: each setup that trains nothing, or something other than intended."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreplica
from dreplica.agreement.wiring.fault import WiringError
from dreplica.errors import DreplicaError, UsageError
from dreplica.replica.wiring import check_wiring

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
    assert caught.value.remedies
    return caught.value


class Holder(nn.Module):
    """A module with the given parameters and buffers."""

    def __init__(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)


# ---- optimizer-not-bound


def test_deepcopied_optimizer_trains_neither_model() -> None:
    original = make_model()
    optimizer = sgd(original)
    model, copied = copy.deepcopy(original), copy.deepcopy(optimizer)
    before = bytes_of(original), bytes_of(model)
    for each in (original, model):
        copied.zero_grad()
        each(torch.ones(5, 4)).sum().backward()
        copied.step()
    assert (bytes_of(original), bytes_of(model)) == before
    # With gradients on the copied parameters, too: the step moves only the orphans.
    for parameter in copied.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    copied.step()
    assert (bytes_of(original), bytes_of(model)) == before

    for each in (original, model):
        error = fault(each, copied)
        assert error.code == "optimizer-not-bound"
        assert "6 of the 6 parameters" in str(error)
        assert "copy.deepcopy(optimizer)" in str(error)
        assert [remedy.code for remedy in error.remedies] == ["create-optimizer-last", "copy-together"]
        assert error.remedies[1].command == "model, optimizer = copy.deepcopy((model, optimizer))"


def test_model_and_optimizer_copied_together_pass() -> None:
    model = make_model()
    check_wiring(*copy.deepcopy((model, sgd(model))))


@pytest.mark.parametrize("num_outputs", [2, 7])
def test_head_replaced_after_optimizer_is_a_fault(num_outputs: int) -> None:
    model = make_model()
    optimizer = sgd(model)
    model[3] = nn.Linear(3, num_outputs)
    error = fault(model, optimizer)
    assert error.code == "optimizer-not-bound"
    assert "2 of the 6 parameters" in str(error)
    # Not reported as a deep copy, even if the new head has the shape of the old one.
    assert "replaced" in str(error)
    assert "deepcopy" not in str(error)
    assert "after the model is final" in error.remedies[0].text


def test_optimizer_of_another_instance_is_a_fault() -> None:
    assert fault(make_model(), sgd(make_model())).code == "optimizer-not-bound"


def test_deepcopied_model_with_old_optimizer_is_a_fault() -> None:
    model = make_model()
    optimizer = sgd(model)
    error = fault(copy.deepcopy(model), optimizer)
    assert error.code == "optimizer-not-bound"
    assert "model or the optimizer was deep-copied alone" in str(error)


def test_optimizer_of_another_model_is_a_fault() -> None:
    error = fault(make_model(), sgd(nn.Linear(9, 9)))
    assert error.code == "optimizer-not-bound"
    assert "created for another model" in str(error)


class Scaled(nn.CrossEntropyLoss):
    """A loss with a trainable parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_optimizer_may_also_train_the_criterion() -> None:
    model, criterion = make_model(), Scaled()
    check_wiring(model, torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1), None, criterion)
    check_wiring(model, sgd(model), None, criterion)


def test_parameters_of_another_criterion_are_orphans() -> None:
    model = make_model()
    optimizer = torch.optim.SGD([*model.parameters(), *Scaled().parameters()], lr=0.1)
    for criterion in (None, Scaled(), nn.CrossEntropyLoss()):
        with pytest.raises(WiringError, match="1 of the 7 parameters") as caught:
            check_wiring(model, optimizer, None, criterion)
        assert caught.value.code == "optimizer-not-bound"


# ---- parameters replaced after the optimizer was created


def to_empty(model: nn.Module) -> nn.Module:
    return model.to_empty(device="cpu")


def converted(model: nn.Module) -> nn.Module:
    """Return the model in another dtype, with new parameters, as `.to()` gives it with this setting."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def wrapped_in_subclass(model: nn.Module) -> nn.Module:
    """Return the model with parameters of a subclass, as a quantization gives it."""
    from torch.testing._internal.two_tensor import TwoTensor

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(TwoTensor(parameter.detach(), parameter.detach().clone())))
    return model


def assigned(model: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


@pytest.mark.parametrize(
    ("device", "replace", "origin", "text"),
    [
        ("meta", to_empty, "moved", "made before the model was converted from meta to cpu, as .to_empty() does"),
        ("cpu", converted, "moved", "made before the model was converted from float32 to float64, as .to() does"),
        ("cpu", wrapped_in_subclass, "converted", "made before the parameters were converted from Parameter to Two"),
        ("cpu", assigned, "copied", "load_state_dict(assign=True)"),
    ],
)
def test_optimizer_made_before_conversion_is_named(
    device: str, replace: Callable[[nn.Module], nn.Module], origin: str, text: str
) -> None:
    with torch.device(device):
        model = make_model()
    optimizer = sgd(model)
    error = fault(replace(model), optimizer)
    assert (error.code, error.fields["origin"]) == ("optimizer-not-bound", origin)
    assert text in str(error)
    check_wiring(model, sgd(model))


def test_moved_model_of_another_shape_is_another_model() -> None:
    """A conversion is named only if shapes prove it."""
    error = fault(make_model().double(), sgd(nn.Linear(9, 9)))
    assert error.fields["origin"] == "another-model"


def test_conversion_that_keeps_parameters_passes() -> None:
    model = make_model()
    optimizer = sgd(model)
    check_wiring(model.to(torch.bfloat16), optimizer)


def test_parametrized_layer_passes() -> None:
    model = make_model()
    optimizer = sgd(model)
    nn.utils.parametrizations.spectral_norm(model[0])
    check_wiring(model, optimizer)  # it keeps the parameter
    nn.utils.parametrizations.weight_norm(model[3])
    error = fault(model, optimizer)  # it makes two new ones
    assert (error.code, error.fields["origin"]) == ("optimizer-not-bound", "replaced")
    check_wiring(model, sgd(model))


def test_low_rank_adapters_of_frozen_model() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)

    model = make_model()
    before = sgd(model)
    model[0] = Adapted(model[0])
    error = fault(model, before)
    assert (error.code, error.tensor) == ("parameters-not-optimized", "0.down.weight")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check_wiring(model, torch.optim.SGD(trainable, lr=0.1))


def test_compiled_model_has_plain_names() -> None:
    model = make_model()
    error = fault(torch.compile(model), torch.optim.SGD(list(model.parameters())[:-1], lr=0.1))
    assert error.tensor == "3.bias"


# ---- parameters-not-optimized


def test_trainable_parameter_in_no_group_is_a_fault() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(list(model.parameters())[:-1], lr=0.1)
    error = fault(model, optimizer)
    assert error.code == "parameters-not-optimized"
    assert error.tensor == "3.bias"
    assert "'3.bias'" in str(error)
    assert error.remedies[1].command == "model.get_parameter('3.bias').requires_grad_(False)"


def test_layer_added_after_optimizer_is_a_fault() -> None:
    model = make_model()
    optimizer = sgd(model)
    model.append(nn.Linear(2, 2))
    assert fault(model, optimizer).tensor == "4.weight"


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_criterion_parameter_held_twice_is_a_fault() -> None:
    model, criterion = make_model(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), criterion.scale, criterion.scale], lr=0.1)
    with pytest.raises(WiringError) as caught:
        check_wiring(model, optimizer, None, criterion)
    assert (caught.value.code, caught.value.tensor) == ("parameters-not-optimized", "criterion.scale")


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_parameter_twice_in_one_group_is_a_fault() -> None:
    model = make_model()
    error = fault(model, torch.optim.SGD([*model.parameters(), model[3].weight], lr=0.1))
    assert error.code == "parameters-not-optimized"
    assert error.tensor == "3.weight"
    assert "more than once" in str(error)


def test_parameter_in_two_groups_is_a_fault() -> None:
    # add_param_group refuses it, a hand-made group does not.
    model = make_model()
    optimizer = sgd(model)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [model[0].weight]})
    assert fault(model, optimizer).tensor == "0.weight"


@pytest.mark.parametrize("held", [True, False])
def test_frozen_trunk_passes_in_the_optimizer_or_not(held: bool) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    check_wiring(model, sgd(model if held else nn.Sequential(*model[1:])))


def test_tied_weights_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    check_wiring(model, sgd(model))


def test_only_memory_is_checked_without_an_optimizer() -> None:
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
def test_scheduler_must_drive_this_optimizer(make: Callable[[torch.optim.Optimizer], object]) -> None:
    model = make_model()
    optimizer = sgd(model)
    check_wiring(model, optimizer, make(optimizer))
    for wrong in (make(sgd(model)), copy.deepcopy(make(optimizer))):
        error = fault(model, optimizer, wrong)
        assert error.code == "scheduler-not-bound"
        assert "copy.deepcopy(scheduler)" in str(error)
        assert "(optimizer, ...)" in str(error.remedies[0].command)


def test_chained_scheduler_of_another_optimizer_is_a_fault() -> None:
    model = make_model()
    optimizer = sgd(model)
    scheduler = chained(optimizer)
    scheduler._schedulers[1] = schedulers.ExponentialLR(sgd(model), 0.9)
    error = fault(model, optimizer, scheduler)
    assert error.code == "scheduler-not-bound"
    assert "ExponentialLR" in str(error.remedies[0].command)


@pytest.mark.filterwarnings("ignore:Seems like .optimizer.step")
def test_deepcopied_scheduler_drives_neither_optimizer() -> None:
    model = make_model()
    optimizer = sgd(model)
    copied = copy.deepcopy(schedulers.ExponentialLR(optimizer, 0.5))
    assert copied.optimizer is not optimizer
    optimizer.step()
    copied.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


class Warmup(schedulers.LRScheduler):
    """A warm-up that hands over to another scheduler, which its state contains."""

    def __init__(self, optimizer: torch.optim.Optimizer, after: object) -> None:
        self.after = after
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


class Wrapper:
    """A scheduler in an attribute, next to the optimizers, as accelerate wraps it."""

    def __init__(self, scheduler: object, optimizer: torch.optim.Optimizer) -> None:
        self.scheduler, self.optimizers, self.split_batches = scheduler, [WrappedOptimizer(optimizer)], False

    def step(self) -> None: ...


class WrappedOptimizer:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None: ...


NESTED: dict[str, Callable[[torch.optim.Optimizer, object], object]] = {
    "after": lambda optimizer, inner: Warmup(optimizer, inner),
    "after[1]": lambda optimizer, inner: Warmup(optimizer, [None, inner]),
    "after['late']": lambda optimizer, inner: Warmup(optimizer, {"late": inner}),
    "after.after": lambda optimizer, inner: Warmup(optimizer, Warmup(optimizer, inner)),
    "after[0].after": lambda optimizer, inner: Warmup(optimizer, (Warmup(optimizer, inner),)),
    "scheduler": lambda optimizer, inner: Wrapper(inner, optimizer),
}


@pytest.mark.parametrize("path", NESTED)
def test_inner_scheduler_of_another_optimizer_is_named(path: str) -> None:
    model = make_model()
    optimizer = sgd(model)
    check_wiring(model, optimizer, NESTED[path](optimizer, step_lr(optimizer)))
    error = fault(model, optimizer, NESTED[path](optimizer, step_lr(sgd(model))))
    assert (error.code, error.fields["path"], error.fields["scheduler"]) == ("scheduler-not-bound", path, "StepLR")
    assert "StepLR scheduler in " in str(error)


def test_scheduler_that_contains_itself_ends() -> None:
    model = make_model()
    optimizer = sgd(model)
    scheduler = Warmup(optimizer, None)
    scheduler.after = [scheduler]
    check_wiring(model, optimizer, scheduler)


def test_scheduler_of_wrapped_optimizer_passes() -> None:
    model = make_model()
    optimizer = sgd(model)
    wrapper: Any = WrappedOptimizer(optimizer)
    check_wiring(model, wrapper, step_lr(optimizer))
    check_wiring(model, optimizer, step_lr(optimizer))


def test_missing_or_unbound_scheduler_passes() -> None:
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
    assert error.code == "storage-shared"
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert error.tensor in names
    assert sum(f"'{name}'" in str(error) for name in names) == 2
    assert [remedy.code for remedy in error.remedies] == ["tie-tensors", "separate-tensors"]
    assert "clone()" in error.remedies[1].text


def tied_as_buffer() -> nn.Module:
    parameter = nn.Parameter(BASE[:4])
    return Holder({"a": parameter}, {"b": parameter})


SEPARATE = {
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
    "an expanded buffer": Holder({"a": BASE}, {"b": torch.zeros(1).expand(4, 4)}),
    "one tensor as parameter and buffer": tied_as_buffer(),
    "recurrent": nn.LSTM(3, 4, num_layers=2, bidirectional=True),
}


@pytest.mark.parametrize("model", SEPARATE.values(), ids=SEPARATE.keys())
def test_separate_memory_passes(model: nn.Module) -> None:
    check_wiring(model, None)


def test_flat_recurrent_weights_in_one_storage_pass() -> None:
    # The layout of cuDNN. On the CPU flatten_parameters does nothing, so the test builds it by hand.
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


def test_wrong_argument_types_are_usage_errors() -> None:
    model = make_model()
    with pytest.raises(UsageError, match=r"^model must be an nn\.Module, got list\. Check each model with its own"):
        check_wiring([model], sgd(model))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^optimizer must be .* or None, got dict") as caught:
        check_wiring(model, {"one": sgd(model)})  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.fields["argument"]) == ("wrong-type", "optimizer")


def test_error_survives_pickling_between_processes() -> None:
    error = fault(make_model(), sgd(make_model()))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is WiringError
    assert isinstance(again, DreplicaError)
    assert isinstance(again, ValueError)
    assert (str(again), again.code, again.tensor) == (str(error), "optimizer-not-bound", None)
    assert again.fields == error.fields
    assert (again.fields["num_orphans"], again.fields["num_parameters"]) == (6, 6)
