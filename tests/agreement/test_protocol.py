"""The message of a step: 40 bytes that compare combined digests and carry the stop flag."""

import itertools
import struct
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreplica.agreement import protocol
from dreplica.distributed.process_group import World
from dreplica.state.stages import Stage, tensors_stage
from tests.harness import run_replicas

HALVES = st.one_of(st.sampled_from([0, 1, -1, -(2**63), 2**63 - 1]), st.integers(-(2**63), 2**63 - 1))


def reduced(words: Sequence[bytes], stops: Sequence[bool]) -> protocol.Outcome:
    """Return the outcome without processes: the all-reduce is an element-wise maximum."""
    messages = [protocol.message(word, stop) for word, stop in zip(words, stops, strict=True)]
    assert all(message.nbytes == protocol.MESSAGE_BYTES for message in messages)
    return protocol.outcome(torch.stack(messages).amax(dim=0))


@given(st.data())
def test_outcome_agrees_if_all_equal_and_stops_if_any(data: st.DataObject) -> None:
    pool = [struct.pack("<qq", *data.draw(st.tuples(HALVES, HALVES))) for _ in range(2)]
    words = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4))
    stops = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    outcome = reduced(words, stops)
    assert outcome.agreed == (len(set(words)) == 1)
    assert outcome.stop == any(stops)


EXTREMES = [0, -1, 1, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("bit", [0, 31, 62, 63, 64, 95, 126, 127])
def test_outcome_detects_one_flipped_bit_of_any_replica(bit: int) -> None:
    for halves in itertools.product(EXTREMES, EXTREMES):
        word = struct.pack("<qq", *halves)
        other = (int.from_bytes(word, "little") ^ (1 << bit)).to_bytes(16, "little")
        assert reduced([word] * 3, [False] * 3).agreed
        for culprit in range(3):
            words = [other if replica == culprit else word for replica in range(3)]
            assert not reduced(words, [False] * 3).agreed, (halves, culprit)


def test_swapped_or_mixed_halves_do_not_agree() -> None:
    assert not reduced([struct.pack("<qq", 1, 2), struct.pack("<qq", 2, 1)], [False] * 2).agreed
    assert not reduced([struct.pack("<qq", *pair) for pair in ((1, 1), (1, 2), (2, 1), (2, 2))], [False] * 4).agreed


def test_fold_depends_on_step_stage_name_and_digest() -> None:
    one, two = tensors_stage({"w": torch.ones(1)}), tensors_stage({"w": torch.zeros(1)})
    words = [
        protocol.fold(step, stages)
        for step in (0, 1)
        for stages in ({}, {"weights": one}, {"weights": two}, {"buffers": one}, {"buffers": two, "weights": one})
    ]
    assert len(set(words)) == len(words)
    assert {len(word) for word in words} == {16}
    assert protocol.fold(1, {"weights": one}) == protocol.fold(1, {"weights": tensors_stage({"w": torch.ones(1)})})


def _exchange(world: World, words: Sequence[bytes]) -> protocol.Outcome:
    posted = protocol.post(world.channel, words[world.replica_id], stop=world.replica_id == 1)
    return protocol.read(world.channel, posted)


def test_every_replica_reads_the_same_outcome() -> None:
    assert run_replicas(_exchange, 2, [b"a" * 16, b"a" * 16]) == [protocol.Outcome(agreed=True, stop=True)] * 2
    words = [b"a" * 16, b"a" * 16, b"b" * 16]
    assert run_replicas(_exchange, 3, words) == [protocol.Outcome(agreed=False, stop=True)] * 3


def _locate(world: World) -> protocol.Place:
    stage = Stage(("a", "b"), b"1" * 16 + bytes([world.replica_id // 2]) * 16)
    return protocol.locate(world.channel, 7, {"weights": stage})


def test_every_replica_locates_the_same_place() -> None:
    one, two, three = run_replicas(_locate, 3)
    assert one == two == three
    assert (one.step, one.stage, one.tensor, one.groups) == (7, "weights", "b", [[0, 1], [2]])
