"""Tests of the loader: equal batches with any number of workers, and no process left behind."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dreplica.config.schema import DataConfig
from dreplica.data.loading import index_stream, loader
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import Batch, load_batches, reload_batch
from dreplica.data.samples import SampleError
from dreplica.distributed.channel import Channel
from dreplica.distributed.liveness.lost import ReplicaLost
from dreplica.distributed.process_group import World
from tests.harness import run_replicas

CPU = torch.device("cpu")


class Numbers(Dataset[tuple[Tensor, int]]):
    """A set whose sample i is noise that depends only on i. Sample `fail_at` cannot be read."""

    def __init__(self, num_samples: int, fail_at: int | None = None) -> None:
        self.num_samples, self.fail_at = num_samples, fail_at

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.fail_at:
            raise OSError(f"sample {index} is unreadable")
        return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(index)), index % 5


def bytes_of(batch: Batch) -> tuple[bytes, bytes, bytes, torch.dtype]:
    tensors = (batch.indices, batch.inputs, batch.labels)
    return (*(tensor.contiguous().numpy().tobytes() for tensor in tensors), batch.labels.dtype)


def load(dataset: Dataset[Any], num_workers: int, channel: Channel | None = None, epoch: int = 1) -> list[Any]:
    stream = IndexSampler(channel or Channel(), 0).training_batches(len(dataset), 4, epoch)  # type: ignore[arg-type]
    return [bytes_of(batch) for batch in load_batches(dataset, stream, CPU, num_workers, seed=0, epoch=epoch)]


@pytest.mark.process
def test_number_of_workers_does_not_change_the_batches() -> None:
    data = Numbers(30)
    batches = load(data, 0)
    assert len(batches) == 8
    assert load(data, 1) == batches
    assert load(data, 2) == batches
    assert load(data, 0, epoch=2) != batches


def test_batch_holds_the_samples_that_were_sent() -> None:
    data = Numbers(10)
    stream = IndexSampler(Channel(), 0).training_batches(10, 4, epoch=1)
    for number, batch in enumerate(load_batches(data, stream, CPU, 0, seed=0, epoch=1)):
        assert batch.indices.equal(stream.batch(number))
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [int(index) % 5 for index in batch.indices]
        assert batch.inputs[0].equal(data[int(batch.indices[0])][0])


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batch_holds_the_weights_of_its_samples(num_workers: int) -> None:
    weights = torch.arange(10) / 8
    stream = IndexSampler(Channel(), 0).training_batches(10, 4, epoch=1)
    for batch in load_batches(Numbers(10), stream, CPU, num_workers, seed=0, epoch=1, weights=weights):
        assert batch.weights is not None
        assert (8 * batch.weights).tolist() == batch.indices.tolist()
        again = reload_batch(Numbers(10), batch.indices, CPU, weights=weights)
        assert [tensor.numpy().tobytes() for tensor in again.tensors().values()] == [
            tensor.numpy().tobytes() for tensor in batch.tensors().values()
        ]
        assert list(again.tensors()) == ["inputs", "labels", "weights"]


def test_memory_format_changes_only_the_layout() -> None:
    stream = IndexSampler(Channel(), 0).evaluation_batches(4, 4)
    (batch,) = load_batches(Numbers(4), stream, CPU, 0, 0, 1, torch.channels_last)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert batch.inputs[2].equal(Numbers(4)[2][0])


def test_memory_format_applies_to_images_only() -> None:
    rows = [(torch.arange(6.0) + number, number) for number in range(4)]
    stream = IndexSampler(Channel(), 0).evaluation_batches(4, 4)
    (batch,) = load_batches(rows, stream, CPU, 0, 0, 1, torch.channels_last)  # type: ignore[arg-type]
    assert batch.inputs[2].equal(rows[2][0])


@pytest.mark.process
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_read_past_the_sent_window(monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    # The smallest window that the loader accepts for this number of workers.
    window = 2 * num_workers + 1
    for module in (index_stream, loader):
        monkeypatch.setattr(module, "WINDOW", window)
    assert len(load(Numbers(100), num_workers)) == 25
    for module in (index_stream, loader):
        monkeypatch.setattr(module, "WINDOW", window - 1)
    with pytest.raises(AssertionError, match="past the window"):
        load(Numbers(100), num_workers)


def test_config_limits_workers_to_what_a_window_feeds() -> None:
    most = next(rule.le for rule in DataConfig.model_fields["num_workers"].metadata if hasattr(rule, "le"))
    assert most * loader._PREFETCH < index_stream.WINDOW


def let_workers_start() -> None:
    """Let a process of the harness, which is a daemon, fork loader workers as under torchrun."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def load_with_own_workers(world: World, window: int) -> list[Any]:
    let_workers_start()
    index_stream.WINDOW = loader.WINDOW = window
    return load(Numbers(120), num_workers=world.replica_id, channel=world.channel)


def test_replicas_may_have_different_numbers_of_workers() -> None:
    # 30 batches in windows of 5: loaders of different speed receive windows at the same pace.
    results = run_replicas(load_with_own_workers, 3, 5)
    assert results[0] == load(Numbers(120), 0)
    assert results[1] == results[0]
    assert results[2] == results[0]


def children_after(act: Callable[[], None]) -> list[Any]:
    before = set(multiprocessing.active_children())
    act()
    for _ in range(100):
        left = [process for process in multiprocessing.active_children() if process not in before]
        if not left:
            break
        time.sleep(0.1)
    return left


def test_closing_early_leaves_no_worker_behind() -> None:
    stream = IndexSampler(Channel(), 0).training_batches(100, 4, epoch=1)
    batches = load_batches(Numbers(100), stream, CPU, 2, seed=0, epoch=1)
    before = set(multiprocessing.active_children())
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    assert children_after(batches.close) == []
    assert list(batches) == []


@pytest.mark.process
def test_worker_error_is_raised_with_code_and_text() -> None:
    for num_workers in (0, 2):
        with pytest.raises(
            SampleError, match=r"at index 7 cannot .* OSError: sample 7 is unreadable .test_loader.py"
        ) as caught:
            load(Numbers(100, fail_at=7), num_workers)
        assert (caught.value.code, caught.value.fields["index"]) == ("sample-not-loaded", 7)


def load_where_one_cannot(world: World, num_workers: int) -> str:
    let_workers_start()
    index_stream.WINDOW = loader.WINDOW = 5
    fail_at = int(index_stream.draw_order(200, 0, 1)[100]) if world.replica_id == 1 else None
    try:
        load(Numbers(200, fail_at), num_workers, world.channel)
        world.channel.gather(None)
    except ReplicaLost:
        return "lost"
    return "done"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_sample_on_one_replica_ends_all(num_workers: int) -> None:
    one, other, third = run_replicas(load_where_one_cannot, 3, num_workers)
    assert isinstance(other, SampleError)
    # The others either returned (and fail at the harness's last collective) or were informed of the loss.
    for result in (one, third):
        assert result == "lost" or isinstance(result, ReplicaLost), result
