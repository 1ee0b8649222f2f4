"""Tests of the index stream: drawn by rank 0, equal on every replica, sent window by window."""

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreplica.data.loading import index_stream
from dreplica.data.loading.index_stream import IndexSampler, IndexStream, draw_order, epoch_generator
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from tests.harness import run_replicas

SIZES = [(1, 1), (1, 5), (7, 1), (8, 2), (9, 2), (24, 2), (25, 2), (40, 3), (41, 40)]
"""(samples, batch size) with no to many windows of 4 batches, complete and partial ones."""


def read(stream: IndexStream) -> list[list[int]]:
    """Read as the training loop does, which receives the next window at the first batch of each."""
    batches = []
    for number, indices in enumerate(stream):
        batches.append(indices)
        stream.consumed(number)
        assert stream.batch(number).tolist() == indices
    return batches


def read_passes(world: World) -> list[list[list[list[int]]]]:
    index_stream.WINDOW = 4
    sampler = IndexSampler(world.channel, seed=3)
    return [
        [
            read(sampler.training_batches(num_samples, batch_size, epoch=1)),
            read(sampler.training_batches(num_samples, batch_size, epoch=2)),
            read(sampler.evaluation_batches(num_samples, batch_size)),
        ]
        for num_samples, batch_size in SIZES
    ]


def test_every_replica_reads_the_order_of_rank_0() -> None:
    results = run_replicas(read_passes, 3)
    assert results[0] == results[1] == results[2]
    for (num_samples, batch_size), (first, second, evaluation) in zip(SIZES, results[0], strict=True):
        for batches, epoch in ((first, 1), (second, 2)):
            whole = draw_order(num_samples, 3, epoch).tolist()
            assert batches == [whole[i : i + batch_size] for i in range(0, num_samples, batch_size)]
        assert list(chain(*evaluation)) == list(range(num_samples))


@given(num_samples=st.integers(1, 300), batch_size=st.integers(1, 70), window=st.integers(1, 9), seed=st.integers(0, 9))
def test_each_sample_occurs_once_in_full_batches(num_samples: int, batch_size: int, window: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_stream, "WINDOW", window)
        stream = IndexSampler(Channel(), seed).training_batches(num_samples, batch_size, epoch=1)
        batches = read(stream)
    assert len(batches) == len(stream)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    assert sorted(chain(*batches)) == list(range(num_samples))


def test_reading_past_the_sent_windows_is_an_error() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_stream, "WINDOW", 2)
        stream = IndexSampler(Channel(), 0).training_batches(20, 2, epoch=1)
        stream.batch(3)
        with pytest.raises(AssertionError, match="batch 4 was read before"):
            stream.batch(4)
        stream.consumed(2)
        stream.batch(5)


def orders(num_samples: int) -> Iterator[tuple[tuple[int, int], bytes]]:
    for seed in [*range(30), 2**16, 1_000_003, 2**32 - 1]:
        for epoch in [*range(1, 60), 1_000_003, 1_000_004, 2_000_006]:
            yield (seed, epoch), draw_order(num_samples, seed, epoch).numpy().tobytes()


def test_orders_differ_between_epochs_and_seeds() -> None:
    seen = dict(orders(64))
    assert len(set(seen.values())) == len(seen)
    assert dict(orders(64)) == seen, "the same seed and epoch give the same order"


def test_order_is_an_unbiased_int64_permutation() -> None:
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
