"""Tests of building a replica from its config: equal bytes from equal seeds, clear errors where it cannot be built."""

import re
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from dreplica.config.load import load_config
from dreplica.config.schema import ModelConfig, RunConfig
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from dreplica.replica.build import broadcast_state, build_model, build_replica
from dreplica.replica.wiring import check_wiring
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators
from tests.fixtures import tiny_model
from tests.harness import run_replicas

CPU = torch.device("cpu")
TINY = {"model": {"factory": "tests.fixtures:tiny_model"}, "optim": {"name": "AdamW", "lr": 0.01}}


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(TINY | sections)


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Return the bytes of each parameter and buffer, non-persistent ones included."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in named}


def build_from(_world: World, seed: int, sections: dict[str, Any]) -> dict[str, bytes]:
    seed_generators(seed)
    return state_bytes(build_replica(config(**sections), 5, CPU).model)


def test_same_seed_builds_same_bytes_in_new_processes() -> None:
    first, second = run_replicas(build_from, 2, 42, {})
    third, _ = run_replicas(build_from, 2, 42, {"seed": {"data": 99}})
    assert first == second == third
    assert first["0.weight"] != b"\0" * len(first["0.weight"])
    seed_generators(43)
    assert state_bytes(build_replica(config(), 5, CPU).model)["0.weight"] != first["0.weight"]


def test_parts_follow_the_config_and_are_wired() -> None:
    built = config(
        criterion={"label_smoothing": 0.1},
        schedule={"name": "StepLR", "step_size": 2},
        optim={"name": "Adam", "lr": 0.5},
    )
    replica = build_replica(built, 5, CPU)
    check_wiring(replica.model, replica.optimizer, replica.scheduler)
    assert replica.criterion.label_smoothing == 0.1
    assert type(replica.optimizer) is torch.optim.Adam
    assert replica.optimizer.param_groups[0]["lr"] == 0.5
    assert replica.scheduler.step_size == 2
    assert replica.scaler is None


def test_num_classes_defaults_to_the_data_set() -> None:
    assert build_replica(config(), 7, CPU).model[-1].out_features == 7
    wider = config(model={**TINY["model"], "num_classes": 9})
    assert build_replica(wider, 7, CPU).model[-1].out_features == 9


@pytest.mark.parametrize("sections", [{}, {"replica": {"factory": f"{__name__}:plain_replica"}}])
def test_fewer_outputs_than_classes_is_a_usage_error(sections: dict[str, Any]) -> None:
    narrow = config(model={**TINY["model"], "num_classes": 3}, **sections)
    with pytest.raises(UsageError, match=r"^model\.num_classes: 3 is fewer than the 7 classes .*null.* 7 or more"):
        build_replica(narrow, 7, CPU)


def test_channels_last_changes_layout_but_no_value() -> None:
    seed_generators(1)
    plain = build_replica(config(), 5, CPU).model
    seed_generators(1)
    last = build_replica(config(model={**TINY["model"], "channels_last": True}), 5, CPU).model
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert state_bytes(last) == state_bytes(plain)


# ---- model.compile


def compiled(setting: bool | str) -> nn.Module:
    seed_generators(1)
    replica = build_replica(config(model={**TINY["model"], "compile": setting}), 5, CPU)
    check_wiring(replica.model, replica.optimizer, replica.scheduler)
    return replica.model


def graphs_compiled() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_keeps_names_and_bytes(backend: str) -> None:
    plain, model = compiled(False), compiled(backend)
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert state_bytes(model) == state_bytes(plain)
    before, images = graphs_compiled(), torch.ones(4, 3, 8, 8)
    assert torch.equal(plain.eval()(images), torch.from_numpy(model.eval()(images).detach().numpy()))
    assert graphs_compiled() == before + 1, "only the compiled model compiles a graph"


def test_each_batch_size_is_compiled_separately() -> None:
    """Code that becomes dynamic at the second batch size would differ from the code that ran the first steps."""
    model = compiled("eager")
    before = graphs_compiled()
    for size in (4, 3, 5, 4, 3):
        model(torch.ones(size, 3, 8, 8))
    assert graphs_compiled() == before + 3


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model.compile=indutcor", "model.compile: torch has no backend 'indutcor'. Did you mean 'inductor'?"),
        (
            "--overrides.1.model.compile=aot-eager",
            "overrides.1.model.compile: torch has no backend 'aot-eager'. Did you mean 'aot_eager'?",
        ),
    ],
)
def test_unknown_backend_error_suggests_the_nearest(argument: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config([argument], 2)
    assert words in str(caught.value)


@pytest.mark.process
@pytest.mark.parametrize("setting", [True, "inductor"])
def test_missing_compiler_is_reported_at_the_build(setting: bool | str) -> None:
    words = r"^model\.compile: .*'inductor'.* no working C\+\+ compiler.*g\+\+.*'aot_eager'"
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UsageError, match=words):
            compiled(setting)
        compiled("aot_eager")
    compiled(setting)


# ---- models by name


def test_every_torchvision_classifier_has_a_builder() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    assert {"resnet18", "vit_b_16", "inception_v3"} <= set(names)
    for name in names:
        # The builder is replaced, so that nothing is built.
        asked = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torchvision.models, "get_model", lambda *args, _asked=asked, **kw: _asked.append((args, kw)))
            build_model(ModelConfig(name=name), 5)
        ((args, arguments),) = asked
        assert args == (name,)
        assert arguments["weights"] is None
        assert arguments["num_classes"] == 5
        assert callable(torchvision.models.get_model_builder(name))


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_head_has_one_output_per_class(name: str) -> None:
    model = build_model(ModelConfig(name=name), 5).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_auxiliary_heads_are_disabled() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name="googlenet"), 5).train()
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
        assert not build_model(ModelConfig(name="inception_v3"), 5).aux_logits


def test_unknown_model_error_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"^model\.name: .*'resnet81'\. Did you mean 'resnet\d+'\?"):
        build_replica(config(model={"name": "resnet81"}), 5, CPU)
    with pytest.raises(UsageError, match="no classification model 'fasterrcnn_resnet50_fpn'"):
        build_replica(config(model={"name": "fasterrcnn_resnet50_fpn"}), 5, CPU)


# ---- factories


def not_a_model(num_classes: int) -> int:
    return num_classes


def lazy_model(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def frozen_model(num_classes: int) -> nn.Module:
    return tiny_model(num_classes).requires_grad_(False)


def not_a_replica(config: RunConfig, num_classes: int, device: torch.device) -> nn.Module:
    return tiny_model(num_classes)


def plain_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model = tiny_model(num_classes).to(device)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=config.optim.lr))


def plateau_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    replica = plain_replica(config, num_classes, device)
    replica.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(replica.optimizer)
    return replica


def no_argument() -> nn.Module:
    return tiny_model(5)


def without_model(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    return replace(plain_replica(config, num_classes, device), model=None)


def without_optimizer(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    return replace(plain_replica(config, num_classes, device), optimizer=None)


def without_criterion(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    return replace(plain_replica(config, num_classes, device), criterion=None)


def criterion_function(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    return replace(plain_replica(config, num_classes, device), criterion=nn.functional.cross_entropy)


def lbfgs_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model = tiny_model(num_classes)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.LBFGS(model.parameters()))


def capturable_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    model = tiny_model(num_classes)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), capturable=True))


def no_scheduler(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    return replace(plain_replica(config, num_classes, device), scheduler={"step_size": 3})


def lazy_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    replica = plain_replica(config, num_classes, device)
    replica.model.append(nn.LazyLinear(num_classes))
    return replica


@pytest.mark.parametrize(
    ("section", "function", "words"),
    [
        ("model", "no_argument", r"model.factory: .* cannot be called with \(num_classes=\): .*unexpected keyword"),
        (
            "replica",
            "no_argument",
            r"replica.factory: .* cannot be called with \(a value, a value, a value\): too",
        ),
        ("replica", "without_model", "replica.factory: the model that .* returned is None. Return an nn.Module"),
        (
            "replica",
            "without_optimizer",
            "replica.factory: the optimizer that .* is None. Return an optimizer of torch.optim",
        ),
        (
            "replica",
            "without_criterion",
            "replica.factory: the criterion that .* is None. Return an nn.Module, for instance torch",
        ),
        ("replica", "criterion_function", "replica.factory: the criterion that .* is a function. Return an nn.Module"),
        ("replica", "lbfgs_replica", "replica.factory: LBFGS needs a closure"),
        ("replica", "capturable_replica", "replica.factory.capturable: expected false, got true. Adam .* on the CPU"),
        ("replica", "no_scheduler", "replica.factory: the scheduler that .* is dict, which has no step"),
        ("model", "not_a_model", "model.factory: .* returned int. Return an nn.Module"),
        ("model", "lazy_model", "model.factory: '1.weight' of the model is not initialized .* dummy batch"),
        ("model", "frozen_model", "optim: AdamW cannot train this model: .*empty parameter list"),
        ("model", "no_such", "model.factory: .* has no function 'no_such'"),
        ("replica", "not_a_replica", "replica.factory: .* returned Sequential. Return dreplica.Replica"),
        ("replica", "plateau_replica", "replica.factory: .*ReduceLROnPlateau.* metric"),
        ("replica", "lazy_replica", "replica.factory: '6.weight' of the model is not initialized"),
    ],
)
def test_bad_factory_result_is_a_usage_error(section: str, function: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"^{words}"):
        build_replica(config(**{section: {"factory": f"{__name__}:{function}"}}), 5, CPU)


def test_replica_factory_is_called_with_the_config() -> None:
    sections = {"replica": {"factory": f"{__name__}:plain_replica"}, "optim": {"lr": 0.7}, "model": {}}
    replica = build_replica(config(**sections), 5, CPU)
    assert replica.optimizer.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"criterion": {"name": "MSELoss"}}, "criterion: MSELoss does not accept"),
        ({"criterion": {"weight": [1, 2]}}, "criterion: CrossEntropyLoss does not accept"),
        (
            {"optim": {"name": "Adam", "capturable": True}},
            r"optim\.capturable: expected false, got true\. Adam .* only on a GPU",
        ),
        ({"optim": {"name": "Muon"}}, "optim: Muon cannot train this model: Muon only supports 2D"),
        (
            {"optim": {"name": "SGD"}, "schedule": {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1.0}},
            "",
        ),
        (
            {"optim": {"name": "Rprop"}, "schedule": {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1.0}},
            "schedule: CyclicLR cannot drive Rprop: .*momentum",
        ),
    ],
)
def test_parts_that_do_not_fit_are_usage_errors(sections: dict[str, Any], words: str) -> None:
    if not words:
        build_replica(config(**sections), 5, CPU)
        return
    with pytest.raises(UsageError, match=f"^{words}"):
        build_replica(config(**sections), 5, CPU)


# ---- broadcast


class MixedState(nn.Module):
    """A model with parameters and buffers of many kinds, filled by rank."""

    def __init__(self, replica_id: int, extra: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(replica_id)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64):
            name = "of_" + str(dtype).removeprefix("torch.")
            self.register_parameter(name, nn.Parameter(torch.randn(3, 2, generator=generator).to(dtype)))
        self.scalar = nn.Parameter(torch.tensor(float(replica_id)))
        self.frozen = nn.Parameter(torch.full((2,), float(replica_id)), requires_grad=False)
        self.transposed = nn.Parameter(torch.randn(3, 4, generator=generator).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.norm = nn.BatchNorm1d(2)
        self.norm.num_batches_tracked.fill_(replica_id)
        self.register_buffer("flags", torch.tensor([True, False, replica_id == 0]))
        self.register_buffer("expanded", torch.tensor([float(replica_id)]).expand(2, 3))
        self.register_buffer("of_float8", torch.tensor([float(replica_id)] * 2).to(torch.float8_e5m2))
        self.register_buffer("of_uint16", torch.tensor([replica_id] * 2).to(torch.uint16))
        self.register_buffer("short", torch.tensor([replica_id], dtype=torch.int16))
        self.register_buffer("hidden", torch.tensor([float("nan"), -0.0, replica_id]), persistent=False)
        if extra and replica_id == 1:
            self.register_buffer("extra", torch.zeros(1))


def broadcast(world: World, with_rng: bool, extra: bool) -> tuple[dict[str, bytes], dict[str, int], tuple[Any, ...]]:
    seed_generators(world.replica_id)
    numpy.random.standard_normal()
    model = MixedState(world.replica_id, extra)
    identities = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    broadcast_state(model, world.channel, with_rng)
    moved = {name: tensor.data_ptr() - identities[name] for name, tensor in model.named_parameters()}
    state = get_rng_state()
    rng = (state["python"], state["numpy"][1].tobytes(), state["numpy"][2:], state["torch"].numpy().tobytes())
    return state_bytes(model), moved, rng


@pytest.mark.parametrize("with_rng", [True, False])
def test_broadcast_copies_rank_0_state_in_place(with_rng: bool) -> None:
    results = run_replicas(broadcast, 3, with_rng, False)
    own = state_bytes(MixedState(0))
    assert state_bytes(MixedState(1)) != own
    for state, moved, rng in results:
        assert {name: state[name] == own[name] for name in own} == dict.fromkeys(own, True)
        assert not any(moved.values()), "in place, so that the optimizer still holds the parameters"
        assert (rng == results[0][2]) is (with_rng or rng is results[0][2])


def test_broadcast_skips_replicas_with_other_tensors() -> None:
    states = [state for state, _, _ in run_replicas(broadcast, 2, True, True)]
    assert states[0] == state_bytes(MixedState(0))
    assert states[1] == state_bytes(MixedState(1, extra=True))


def test_too_few_outputs_error_names_key_value_and_remedy() -> None:
    with pytest.raises(UsageError) as caught:
        build_replica(config(model={**TINY["model"], "num_classes": 2}), 5, CPU)
    assert re.match(r"model\.num_classes: 2 .*5 classes.*'digits' \(data\.name\)", str(caught.value))
