"""The order of samples: drawn by rank 0, the same on every replica, window by window."""

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreplica.data.loading import index_stream as coordinator
from dreplica.data.loading.index_stream import Coordinator, IndexStream, draw_order, epoch_generator
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from tests.harness import run_replicas

SIZES = [(1, 1), (1, 5), (7, 1), (8, 2), (9, 2), (24, 2), (25, 2), (40, 3), (41, 40)]
"""(samples, batch size): with windows of 4 batches, none to many windows, whole and partial ones."""


def read(stream: IndexStream) -> list[list[int]]:
    """As the loop does: batch after batch, the next window at the first of each."""
    batches = []
    for number, indices in enumerate(stream):
        batches.append(indices)
        stream.consumed(number)
        assert stream.batch(number).tolist() == indices
    return batches


def read_passes(world: World) -> list[list[list[list[int]]]]:
    coordinator.WINDOW = 4
    drawer = Coordinator(world.channel, seed=3)
    return [
        [
            read(drawer.training_batches(num_samples, batch_size, epoch=1)),
            read(drawer.training_batches(num_samples, batch_size, epoch=2)),
            read(drawer.evaluation_batches(num_samples, batch_size)),
        ]
        for num_samples, batch_size in SIZES
    ]


def test_every_replica_reads_exactly_rank_0s_order() -> None:
    results = run_replicas(read_passes, 3)
    assert results[0] == results[1] == results[2]
    for (num_samples, batch_size), (first, second, evaluation) in zip(SIZES, results[0], strict=True):
        for batches, epoch in ((first, 1), (second, 2)):
            whole = draw_order(num_samples, 3, epoch).tolist()
            assert batches == [whole[i : i + batch_size] for i in range(0, num_samples, batch_size)]
        assert list(chain(*evaluation)) == list(range(num_samples))


@given(num_samples=st.integers(1, 300), batch_size=st.integers(1, 70), window=st.integers(1, 9), seed=st.integers(0, 9))
def test_any_sizes_give_each_sample_once_in_full_batches(
    num_samples: int, batch_size: int, window: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator, "WINDOW", window)
        stream = Coordinator(Channel(), seed).training_batches(num_samples, batch_size, epoch=1)
        batches = read(stream)
    assert len(batches) == len(stream)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert sorted(chain(*batches)) == list(range(num_samples))


def test_a_batch_is_not_read_before_its_window_was_sent() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator, "WINDOW", 2)
        stream = Coordinator(Channel(), 0).training_batches(20, 2, epoch=1)
        stream.batch(3)
        with pytest.raises(AssertionError, match="batch 4 was read before"):
            stream.batch(4)
        stream.consumed(2)
        stream.batch(5)


def orders(num_samples: int) -> Iterator[tuple[tuple[int, int], bytes]]:
    for seed in [*range(30), 2**16, 1_000_003, 2**32 - 1]:
        for epoch in [*range(1, 60), 1_000_003, 1_000_004, 2_000_006]:
            yield (seed, epoch), draw_order(num_samples, seed, epoch).numpy().tobytes()


def test_no_two_epochs_of_any_seed_share_an_order() -> None:
    seen = dict(orders(64))
    assert len(set(seen.values())) == len(seen)
    assert dict(orders(64)) == seen, "the same again for the same seed and epoch"


def test_an_order_is_an_int64_permutation_whose_ends_do_not_favour_any_sample() -> None:
    order = draw_order(1000, 0, 1)
    assert order.dtype == torch.int64
    assert order.sort().values.equal(torch.arange(1000))
    firsts = {int(draw_order(10, 0, epoch)[0]) for epoch in range(1, 200)}
    assert firsts == set(range(10))


def test_loader_generators_differ_by_seed_and_epoch() -> None:
    words = {
        (seed, epoch): torch.randint(2**62, (2,), generator=epoch_generator(seed, epoch)).numpy().tobytes()
        for seed in (0, 1, 2**32 - 1)
        for epoch in (0, 1, 1_000_003, 1_000_004)
    }
    assert len(set(words.values())) == len(words)
    again = torch.randint(2**62, (2,), generator=epoch_generator(0, 1))
    assert again.numpy().tobytes() == words[0, 1]
