"""The choice of a device, with GPUs that are made up."""

import pytest
import torch

from dreplica.config.schema import WorldConfig
from dreplica.environment.device import bind_device
from dreplica.errors import UsageError


def test_device_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    device = bind_device(WorldConfig(device="auto"))
    assert (device.device, device.shared) == (torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("num_gpus", "advice"),
    [(0, "Use --world.device auto"), (1, "Start at most 1 replicas on this node, or use --world")],
)
def test_device_cuda_requires_a_gpu_per_replica(monkeypatch: pytest.MonkeyPatch, num_gpus: int, advice: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError) as caught:
        bind_device(WorldConfig(device="cuda"))
    assert str(caught.value).startswith("world.device: 'cuda' requires one GPU for each of the 2 replicas on this node")
    assert advice in str(caught.value)


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (2, 0)])
def test_device_auto_shares_gpus(monkeypatch: pytest.MonkeyPatch, local_rank: int, index: int) -> None:
    bound = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    device = bind_device(WorldConfig(device="auto"))
    assert (device.device, device.shared) == (torch.device("cuda", index), True)
    assert bound == [torch.device("cuda", index)]


@pytest.mark.parametrize(
    ("variables", "num_gpus", "index", "shared"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, 1, 0, False),
        ({"SLURM_GPUS_PER_TASK": "a100:1"}, 1, 0, False),
        ({"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu:1"}, 1, 0, False),
        ({"SLURM_TRES_PER_TASK": "gres/gpu=2"}, 1, 0, True),
        ({"SLURM_GPUS_PER_TASK": "1"}, 2, 1, True),  # --gpu-bind=none: each task sees all of them
        ({"SLURM_GPUS_PER_TASK": "1", "TORCHELASTIC_RUN_ID": "a"}, 1, 0, True),  # the GPU of torchrun, for all workers
        ({"SLURM_TRES_PER_TASK": "cpu=1"}, 1, 0, True),
        ({"SLURM_GPUS_PER_TASK": "many"}, 1, 0, True),
        ({}, 1, 0, True),
    ],
)
def test_device_is_not_shared_with_a_gpu_per_task(
    variables: dict[str, str], num_gpus: int, index: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun --gpus-per-task=1 lets each of the three tasks see its own GPU, with index 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", **variables}.items():
        monkeypatch.setenv(name, value)
    device = bind_device(WorldConfig(device="auto"))
    assert (device.device, device.shared) == (torch.device("cuda", index), shared)
    if not shared:
        assert bind_device(WorldConfig(device="cuda")) == device
