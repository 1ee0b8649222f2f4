"""Agreement on meshes of 4 gloo processes: FSDP2, HSDP, tensor parallelism, a subset of ranks, pipeline stages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dreplica import Agreement, Divergence
from dreplica.distributed.process_group import World
from dreplica.errors import UsageError
from tests.harness import run_replicas

pytestmark = pytest.mark.process
IMPORTS = ("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "dreplica")
STEP = 3


class Block(nn.Module):
    """A residual block with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = inputs + self.down(torch.relu(self.up(self.norm(inputs))))
        return result


def build(kind: str) -> tuple[nn.Module, int]:
    """Return a sharded model, and the number of this rank's batches. Uneven: 6 rows over 4 ranks, and 3 on 4."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 3))
    rank, size = dist.get_rank(), dist.get_world_size()
    if kind == "tp":
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()})
        return model, 0
    if kind in ("hsdp", "left-out"):
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    left_out = {model[2].bias} if kind == "left-out" else set()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=left_out)
    return model, rank


Act = Callable[[nn.Module, torch.optim.Optimizer], None]


def bit_of_weight(name: str, rank: int) -> Act:
    """Return a mistake: one rank changes its part of a parameter after the step."""

    def act(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if dist.get_rank() == rank:
            flip(model.get_parameter(name))

    return act


def flip(tensor: Any) -> None:
    local = getattr(tensor, "_local_tensor", tensor).detach()
    local.view(torch.int32).view(-1)[0] ^= 1


def train(world: World, kind: str, what: str, name: str, rank: int, steps: int) -> dict[str, Any]:
    model, shift = build(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(shift)
    agreement = Agreement(model, optimizer)
    try:
        for step in range(1, steps + 1):
            batch = torch.randn(4, 6, generator=generator)
            loss = model(batch).square().mean()
            loss.backward()
            if what == "gradient" and step == STEP and dist.get_rank() == rank:
                flip(model.get_parameter(name).grad)
            if what == "local-norm":
                own = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
                scale = 0.01 / torch.stack([each.norm() for each in own if each is not None]).norm()
                for each in own:
                    each.mul_(scale)  # type: ignore[union-attr]
            if what == "lr" and step == STEP and dist.get_rank() >= rank:
                optimizer.param_groups[0]["lr"] = 0.02
            optimizer.step()
            parameter = model.get_parameter(name) if name else None
            if what in ("weight", "exp_avg") and step == STEP and dist.get_rank() == rank:
                flip(parameter if what == "weight" else optimizer.state[parameter]["exp_avg"])  # type: ignore[index]
            agreement.step(batch=batch, loss=loss)
            optimizer.zero_grad()
        summary = agreement.finish().summary
    except Divergence as divergence:
        return divergence.verdict.as_dict()
    finally:
        agreement.close()
    return {"summary": summary}


def result(kind: str, what: str = "", name: str = "", rank: int = 0, num_ranks: int = 4) -> dict[str, Any]:
    rows = run_replicas(train, num_ranks, kind, what, name, rank, 5, imports=IMPORTS)
    assert all(isinstance(row, dict) for row in rows), rows
    assert all(row == rows[0] for row in rows)
    return rows[0]


def test_fsdp2_without_replicas_says_what_has_no_copy() -> None:
    summary = result("fsdp2")["summary"]
    assert summary.startswith("AGREED 4 ranks (shard 4), 5 steps: optimizer; not compared: split over all axes")
    assert "14 of 14 entries of weights, 14 of 14 entries of gradients" in summary


def test_hsdp_agrees_on_every_shard() -> None:
    assert result("hsdp")["summary"] == "AGREED 4 ranks (replicate 2 x shard 2), 5 steps: gradients, optimizer, weights"


def test_tensor_parallelism_agrees_on_what_is_replicated() -> None:
    summary = result("tp")["summary"]
    assert summary.startswith("AGREED 4 ranks (tp 4), 5 steps: gradients, optimizer, weights; not compared")
    assert "6 of 14 entries of weights" in summary
    assert "warning" not in summary, "the ranks of a tensor-parallel model have the same batches by design"


@pytest.mark.parametrize(
    ("kind", "what", "name", "rank", "stage", "tensor", "groups", "shard"),
    [
        ("hsdp", "weight", "0.up.weight", 2, "weights", "0.up.weight", [[0], [2]], {"shard": 0}),
        ("hsdp", "gradient", "1.down.bias", 1, "gradients", "1.down.bias", [[1], [3]], {"shard": 1}),
        ("hsdp", "exp_avg", "2.weight", 3, "optimizer", "2.weight.exp_avg", [[1], [3]], {"shard": 1}),
        ("tp", "weight", "0.norm.weight", 3, "weights", "0.norm.weight", [[0, 1, 2], [3]], None),
        ("tp", "gradient", "1.down.bias", 1, "gradients", "1.down.bias", [[0, 2, 3], [1]], None),
    ],
)
def test_one_bit_is_found_with_tensor_shard_and_ranks(
    kind: str, what: str, name: str, rank: int, stage: str, tensor: str, groups: list[list[int]], shard: Any
) -> None:
    verdict = result(kind, what, name, rank)
    assert (verdict["step"], verdict["stage"], verdict["tensor"]) == (STEP, stage, tensor)
    assert (verdict["groups"], verdict.get("shard")) == (groups, shard)
    assert verdict["suspects"] == ([rank] if len(groups[0]) > 1 else [])
    assert verdict["mesh"] == ({"tp": 4} if kind == "tp" else {"replicate": 2, "shard": 2})


def test_majority_of_three_replicas_names_the_suspect() -> None:
    verdict = result("hsdp", "weight", "0.up.weight", 4, num_ranks=6)
    assert (verdict["suspects"], verdict["groups"], verdict["shard"]) == ([4], [[0, 2], [4]], {"shard": 0})


def test_a_flip_without_a_second_copy_is_not_seen() -> None:
    assert result("tp", "weight", "0.up.weight", 1)["summary"].startswith("AGREED")


def test_a_parameter_left_out_of_fully_shard_is_found() -> None:
    verdict = result("left-out")
    assert (verdict["step"], verdict["stage"], verdict["tensor"]) == (1, "gradients", "2.bias")
    assert (verdict["groups"], verdict.get("shard")) == ([[0], [1], [2], [3]], None)


def test_learning_rate_is_named_with_values_and_remedy() -> None:
    verdict = result("hsdp", "lr", rank=2)
    assert (verdict["cause"], verdict["tensor"]) == ("hyperparameter-differs", "group0.lr")
    texts = [each["text"] for each in verdict["evidence"]]
    assert "values: group0.lr 0.01 on replicas 0, 1, 0.02 on replicas 2, 3" in texts
    assert [each["code"] for each in verdict["remedy"]] == ["set-value-alike"]


def test_clipping_by_the_local_norm_is_found_under_tp_only() -> None:
    verdict = result("tp", "local-norm")
    assert (verdict["step"], verdict["stage"]) == (1, "gradients")
    assert result("hsdp", "local-norm")["summary"].startswith("AGREED")


def in_two_groups(world: World, wrong: int) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    torch.manual_seed(rank // 2)
    model = DistributedDataParallel(nn.Linear(2, 2), process_group=groups[rank // 2])
    agreement = Agreement(model)
    try:
        for _ in range(3 + rank // 2):  # the groups take different numbers of steps
            model(torch.ones(1, 2)).sum().backward()
            if rank == wrong:
                flip(model.module.weight.grad)
            agreement.step()
            model.zero_grad()
        return agreement.finish().summary
    except Divergence as divergence:
        return divergence.verdict.as_dict()
    finally:
        agreement.close()


def test_ddp_in_two_groups_is_compared_within_each() -> None:
    one, two = (f"AGREED 2 ranks, {steps} steps: gradients, weights" for steps in (3, 4))
    assert run_replicas(in_two_groups, 4, -1, imports=IMPORTS) == [one, one, two, two]


def test_a_verdict_of_a_group_names_the_ranks_of_the_job() -> None:
    *sound, one, other = run_replicas(in_two_groups, 4, 3, imports=IMPORTS)
    assert sound == ["AGREED 2 ranks, 3 steps: gradients, weights"] * 2
    assert one == other
    lines = [line["data"] for line in one["evidence"] if line["code"] == "group-ranks"]
    assert [line["ranks"] for line in lines] == [[2, 3]]


def pipeline(world: World, partitioned: tuple[str, ...], name: str) -> Any:
    from torch.distributed import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh.get_local_rank("pp")
    torch.manual_seed(stage)
    model = nn.Linear(2, 2 + stage)
    with Agreement(model, mesh=mesh, partitioned=partitioned, expect="ddp", stages=["weights"]) as agreement:
        if name and dist.get_rank() == 3:
            flip(model.get_parameter(name))
        agreement.step()
        return agreement.finish().summary


def test_pipeline_stages_are_compared_within_each() -> None:
    summary = "AGREED 4 ranks (pp 2 x dp 2), 1 step: weights"
    assert run_replicas(pipeline, 4, ("pp",), "", imports=IMPORTS) == [summary] * 4
    rows = run_replicas(pipeline, 4, ("pp",), "bias", imports=IMPORTS)
    assert all(isinstance(row, Divergence) for row in rows)
    assert (rows[0].verdict.tensor, rows[0].verdict.groups, rows[0].verdict.shard) == ("bias", [[2], [3]], {"pp": 1})


@pytest.mark.parametrize("partitioned", [(), ("tp",)])
def test_stages_that_are_not_declared_are_an_error(partitioned: tuple[str, ...]) -> None:
    rows = run_replicas(pipeline, 4, partitioned, "", imports=IMPORTS)
    if partitioned:
        assert all(isinstance(row, UsageError) and "'tp' is no axis of the mesh" in str(row) for row in rows)
    else:
        assert all(isinstance(row, Divergence) and row.verdict.step == 0 for row in rows)
