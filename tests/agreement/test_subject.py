"""Several, wrapped and compiled models: every tensor has its name in the bare model."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreplica
from dreplica.agreement.agreement import Agreement
from dreplica.agreement.subject import Subject
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from dreplica.state.stages import batch_stage, gradients_stage, optimizer_stage
from tests.agreement.bodies import flip_bit, seed_everything, tiny_model
from tests.harness import run_replicas

FAULTS: dict[str, tuple[str, str]] = {
    "none": ("", ""),
    "generator": ("weights", "generator.0.bias"),
    "gradient": ("gradients", "critic.0.weight"),
    "exp_avg": ("optimizer", "critic.0.weight.exp_avg"),
    "lr": ("optimizer", "generator.group0.lr"),
    "statistics": ("buffers", "generator.1.running_mean"),
}


def _gan(world: World, fault: str) -> Verdict | None:
    seed_everything(0)
    generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    critic = nn.Sequential(nn.Linear(4, 1))
    optimizers = {
        "generator": torch.optim.Adam(generator.parameters(), lr=0.01),
        "critic": torch.optim.Adam(critic.parameters(), lr=0.01),
    }
    agreement = Agreement({"generator": generator, "critic": critic}, optimizers, on_divergence="continue")
    for step in range(1, 4):
        real, noise = torch.randn(8, 4), torch.randn(8, 2)
        optimizers["critic"].zero_grad()
        (critic(generator(noise).detach()).mean() - critic(real).mean()).backward()
        optimizers["critic"].step()
        optimizers["generator"].zero_grad()
        loss = -critic(generator(noise)).mean()
        loss.backward()
        optimizers["generator"].step()
        if world.replica_id == 1 and step == 2:
            tensors: dict[str, Tensor] = {
                "generator": generator[0].bias,
                "gradient": critic[0].weight.grad,
                "exp_avg": optimizers["critic"].state[critic[0].weight]["exp_avg"],
                "statistics": generator[1].running_mean,
            }
            if fault in tensors:
                flip_bit(tensors[fault])
            elif fault == "lr":
                optimizers["generator"].param_groups[0]["lr"] = 0.02
        agreement.step(batch={"real": real, "noise": noise}, loss=loss)
    agreement.finish()
    return agreement.divergence


def _gans(world: World) -> dict[str, Verdict | None]:
    return {fault: _gan(world, fault) for fault in FAULTS}


def test_all_tensors_of_several_models_are_compared() -> None:
    one, two = run_replicas(_gans, 2)
    assert isinstance(one, dict), one
    assert one == two
    for fault, verdict in one.items():
        found = None if verdict is None else (verdict.step, verdict.stage, verdict.tensor)
        assert found == (None if fault == "none" else (2, *FAULTS[fault])), fault


def test_parameter_in_two_optimizers_has_two_states() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for name in ("fast", "slow")}
    model(torch.ones(2)).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    before = optimizer_stage(model, optimizers).entries()
    assert {"fast.weight.momentum_buffer", "slow.weight.momentum_buffer", "fast.group0.lr"} <= before.keys()
    optimizers["slow"].state[model.weight]["momentum_buffer"] += 1
    after = optimizer_stage(model, optimizers).entries()
    assert [name for name in before if before[name] != after[name]] == ["slow.weight.momentum_buffer"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model),
        lambda model: nn.Sequential(*map(torch.compile, model)),
        lambda model: torch.compile(nn.Sequential(*map(torch.compile, model))),
    ],
)
def test_compiled_model_has_names_of_the_model(wrap: Any) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    plain = Agreement(model, optimizer).observe()
    assert Agreement(wrap(model), optimizer).observe() == plain
    assert "0.weight" in plain["weights"].names


def test_frozen_parameter_has_other_name_in_gradients() -> None:
    model = nn.Linear(2, 2)
    before = gradients_stage(model)
    model.weight.requires_grad_(False)
    frozen = gradients_stage(model)
    assert (before.names, frozen.names) == (("bias", "weight"), ("bias", "weight (requires_grad=False)"))
    model.weight.grad = torch.ones(2, 2)
    assert gradients_stage(model).digest != frozen.digest


def test_micro_batches_are_not_inputs_and_labels() -> None:
    pair = (torch.zeros(2, 3), torch.zeros(2))
    assert batch_stage(pair).names == ("inputs", "labels")
    assert batch_stage([pair, pair]).names == ("0.0", "0.1", "1.0", "1.1")
    assert batch_stage([pair, pair, pair]).names[:2] == ("0.0", "0.1")
    assert batch_stage(({"ids": pair[0], "mask": pair[0]}, pair[1])).names == ("inputs.ids", "inputs.mask", "labels")


def test_no_optimizer_stage_without_optimizer() -> None:
    agreement = Agreement({"only": nn.Linear(2, 2)})
    agreement.step(loss=torch.ones(()))
    assert set(agreement.observe()) == {"buffers", "gradients", "weights", "rng"}
    assert "only.weight" in agreement.observe()["weights"].names
    assert set(agreement.fingerprints()[0]) == {"weights", "buffers"}


def test_tensor_without_memory_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(TypeError, match=r"'1\.weight': a fingerprint needs .* on meta"):
        Agreement(model)


@pytest.mark.parametrize("name", ["a.b", "", "train", 3])
def test_invalid_model_name_is_rejected(name: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"model: {name!r} is not a valid name for a model")):
        Subject({name: nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ([nn.Linear(1, 1)],),
            "model must be an nn.Module, or several by name: {'generator': g, 'critic': c}, got list.",
        ),
        (({"one": None},), "model must be an nn.Module, or several by name: .*, got NoneType."),
        (({},), "model must name at least one nn.Module, got {}."),
        ((nn.Linear(1, 1), []), "optimizer must be an optimizer, or several by name: .*, got list."),
        (
            (nn.Linear(1, 1), None, nn.Linear(1, 1)),
            "others must be a list of objects with a state_dict: [scheduler, scaler], got Linear.",
        ),
        (
            (nn.Linear(1, 1), None, [torch.Generator()]),
            "others must be a list of objects with a state_dict: [scheduler, scaler], got one with a Generator.",
        ),
    ],
)
def test_subject_rejects_wrong_types(arguments: Any, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        Subject(*arguments)
    assert raised.value.code == "invalid-argument"
    assert raised.value.fields["argument"] == text.partition(" ")[0]
    assert re.fullmatch(re.escape(text).replace(r"\.\*", ".*"), str(raised.value))


def _in_fsdp(world: World, strategy: str, use_orig_params: bool) -> Any:
    """Check the error for a model in FSDP, and return the digests of its whole tensors, or the verdict."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    seed_everything(0)
    bare = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    model = FullyShardedDataParallel(
        bare,
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if strategy != "NO_SHARD":
        words = rf"model: it is in FullyShardedDataParallel, so each rank .*\({strategy}\).*summon_full_params"
        for given in (model, {"generator": nn.Sequential(model)}):
            with pytest.raises(ValueError, match=words):
                Agreement(given, optimizer)
        with FullyShardedDataParallel.summon_full_params(model):
            return dreplica.fingerprint(dict(model.named_parameters()))
    agreement = Agreement(model, optimizer, on_divergence="continue")
    for step in range(1, 4):
        optimizer.zero_grad()
        model(torch.randn(4, 3) + world.replica_id).sum().backward()
        optimizer.step()
        if world.replica_id == 1 and step == 3:
            flip_bit(next(iter(optimizer.state.values()))["momentum_buffer"])
        agreement.step()
    return agreement.divergence


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_fsdp_is_rejected_unless_no_shard(
    use_orig_params: bool,
) -> None:
    one, two = run_replicas(_in_fsdp, 2, "FULL_SHARD", use_orig_params)
    assert isinstance(one, dict), one
    assert one == two
    for verdict in run_replicas(_in_fsdp, 2, "NO_SHARD", use_orig_params):
        assert isinstance(verdict, Verdict), verdict
        assert (verdict.step, verdict.stage) == (3, "optimizer"), "batches and generators need not agree"


def test_finish_warns_if_nothing_was_compared(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(1, 1)
    for given in ({"batch": torch.ones(1)}, {}):
        agreement = Agreement(model, expect="independent", steps_done=5)
        agreement.finish()
        agreement.step(**given)
        assert not caplog.messages
        agreement.finish()
    assert caplog.messages == ["nothing was compared in 1 steps: step() was given none of indices, batch"]


@pytest.mark.parametrize(
    ("rank", "size", "text"),
    [
        ("RANK", "WORLD_SIZE", "WORLD_SIZE is 2"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun started 2 processes (SLURM_STEP_NUM_TASKS=2)"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "mpirun started 2 processes (OMPI_COMM_WORLD_SIZE=2)"),
    ],
)
def test_processes_without_process_group_are_rejected(
    rank: str, size: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {rank: "1", size: "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        Agreement(nn.Linear(2, 2))
    assert str(caught.value).startswith(f"{text} but there is no process group, so nothing would be compared. Call ")
    assert caught.value.code == "no-process-group"
