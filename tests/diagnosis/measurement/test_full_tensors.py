"""Element-wise comparison: bit flips against overwritten numbers, and the side that is wrong."""

import random
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from torch import Tensor

from dreplica.diagnosis.decision.rules import name_in
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import Decision, OpDifference
from dreplica.diagnosis.evidence.tensor_diff import Difference, compare_elements
from dreplica.diagnosis.measurement import full_tensors
from dreplica.diagnosis.measurement.float64_arbitration import Arbitration
from dreplica.diagnosis.measurement.full_tensors import compare, compare_outputs, is_rewritten, was_written
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.distributed.process_group import World
from dreplica.training.corruption import flip_bits
from tests.harness import run_replicas

SEEDED = torch.Generator().manual_seed(0)
TENSORS = {
    "weight": torch.randn(64, 32, generator=SEEDED),
    "bias": torch.randn(10, generator=SEEDED),
    "short bias": torch.randn(5, generator=SEEDED),
    "batches": torch.tensor(12),
    "step": torch.tensor(12.0),
    "indices": torch.arange(16),
    "bf16": torch.randn(8, generator=SEEDED).bfloat16(),
    "flags": torch.ones(9, dtype=torch.bool),
}


def difference(sound: Tensor, other: Tensor) -> Difference:
    found = compare_elements(sound, other)
    assert found is not None
    return found


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_was_written_false_for_flipped_bits(name: str, bits: int) -> None:
    for seed in range(40):
        corrupted = TENSORS[name].clone()
        flip_bits(corrupted, bits, random.Random(seed))
        assert not was_written(difference(TENSORS[name], corrupted))


def test_was_written_true_for_more_than_a_few_bits() -> None:
    for seed in range(40):
        corrupted = TENSORS["weight"].clone()
        flip_bits(corrupted, 9, random.Random(seed))
        assert was_written(difference(TENSORS["weight"], corrupted))


@pytest.mark.parametrize("factor", [0.99, 0.9, 1.001])
@pytest.mark.parametrize("name", ["weight", "bias", "short bias"])
def test_was_written_true_for_scaled_tensor(name: str, factor: float) -> None:
    written = TENSORS[name].clone()
    memory = written.numpy()
    numpy.multiply(memory, numpy.float32(factor), out=memory)
    assert was_written(difference(TENSORS[name], written))


def test_was_written_true_for_replaced_number() -> None:
    for step in range(40):
        value = torch.tensor([1.3 * 0.99**step])
        assert was_written(difference(value, value * 0.99))
        image = TENSORS["weight"].clone()
        image[3, 5] = 0.1 * (step + 1)
        found = difference(TENSORS["weight"], image)
        assert was_written(found) == (found.differing_bits > 4)


def test_compare_describes_other_shapes_and_dtypes() -> None:
    assert compare(torch.zeros(2), torch.zeros(3)) == "torch.float32 (2,) on one side, torch.float32 (3,) on the other"
    assert "float16" in str(compare(torch.zeros(2), torch.zeros(2).half()))
    assert compare(torch.zeros(2), torch.zeros(2)) is None


# ---- which side is wrong


class Recorded:
    """Fake replayer with one operator, whose result is wrong on some replicas."""

    def __init__(self, function: str, result: Tensor | None, arguments: tuple[Tensor, ...]) -> None:
        self.tracer = OpTracer(capture=0)
        with self.tracer:
            getattr(torch, function)(*arguments)
        assert self.tracer.captured is not None
        outputs = self.tracer.captured.outputs if result is None else [result]
        self.tracer.captured = replace(self.tracer.captured, outputs=outputs)

    def again(self, indices: Tensor, capture: int) -> "Recorded":
        return self


def settled(
    world: World,
    function: str,
    arguments: tuple[Tensor, ...],
    results: list[Any],
    found: Decision,
    votes: bool = True,
) -> Decision:
    replayer: Any = Recorded(function, results[world.replica_id], arguments)
    return name_in(compare_outputs(found, replayer, torch.tensor([0]), world.channel, True, votes))


A, B = torch.randn(6, 40, generator=SEEDED), torch.randn(40, 3, generator=SEEDED)
SOUND = A @ B
WRONG = SOUND * 1.1
A_LITTLE = torch.exp(A) + torch.eye(6, 40)
ROUNDED = torch.nextafter(SOUND, torch.full_like(SOUND, 9.0))


def place() -> OpDifference:
    with OpTracer() as tracer:
        _ = A @ B
    (record,) = tracer.records
    return OpDifference(0, record, record)


def found(*kinds: Kind, suspects: list[int], sides: tuple[int, int] = (0, 1), groups: Any = ([0], [1])) -> Decision:
    findings = [Finding(kind) for kind in (Kind.REPLAYS_REPRODUCE, Kind.OPERATOR_MADE_IT, *kinds)]
    return Decision("unexplained", suspects, [], place(), sides, groups=list(groups), findings=findings)


@pytest.mark.parametrize(
    ("results", "groups", "cause", "suspects"),
    [
        ([None, WRONG, None], [[0, 2], [1]], "persistent-fault", [1]),
        ([None, WRONG, WRONG], [[1, 2], [0]], "persistent-fault", [1, 2]),
        ([WRONG, WRONG, None], [[0, 1], [2]], "persistent-fault", [0, 1]),
        ([None, WRONG], [[0], [1]], "persistent-fault", [1]),
        ([None, ROUNDED], [[0], [1]], "unexplained", []),
        ([None, ROUNDED, None], [[0, 2], [1]], "unexplained", [1]),
        ([WRONG, -WRONG], [[0], [1]], "unexplained", []),
    ],
)
def test_suspect_is_side_outside_rounding_error(
    results: list[Any], groups: list[list[int]], cause: str, suspects: list[int]
) -> None:
    outvoted = groups[1] if len(groups[0]) > len(groups[1]) else []
    sides = (0, next(r for r in range(1, len(results)) if (0 in groups[0]) != (r in groups[0])))
    decision = found(suspects=outvoted, sides=sides, groups=groups)
    decisions = run_replicas(settled, len(results), "mm", (A, B), results, decision)
    assert [(row.cause, row.suspects) for row in decisions] == [(cause, suspects)] * len(results), decisions
    assert {Kind.BOTH_POSSIBLE in row.kinds for row in decisions} == {any(result is ROUNDED for result in results)}


@pytest.mark.parametrize("votes", [True, False])
@pytest.mark.parametrize("outvoted", [[], [1]])
def test_suspects_without_bound_follow_majority(outvoted: list[int], votes: bool) -> None:
    cause = "persistent-fault" if outvoted and votes else "unexplained"
    decisions = run_replicas(settled, 2, "exp", (A,), [None, A_LITTLE], found(suspects=outvoted), votes)
    assert [(row.cause, row.suspects) for row in decisions] == [(cause, outvoted)] * 2, decisions
    assert any(line.code == "float64-no-bound" for line in decisions[0].evidence)


def test_failed_float64_run_is_unexplained() -> None:
    """A kernel may not support float64. Here, results of another shape make the run fail."""
    decisions = run_replicas(settled, 2, "mm", (A, B), [None, SOUND[:5]], found(suspects=[]))
    assert [row.cause for row in decisions] == ["unexplained"] * 2, decisions
    assert any(line.code == "float64-failed" for line in decisions[0].evidence)


@pytest.mark.parametrize(("changed", "rewritten"), [(3, False), (64, False), (600, False), (2000, True)])
def test_is_rewritten_true_for_most_bits_of_most_elements(changed: int, rewritten: bool) -> None:
    """A patched operator scales its whole result; a defective unit computes some elements wrongly."""
    wrong = TENSORS["weight"].clone()
    wrong.view(-1)[:changed] *= 1.1
    assert is_rewritten(TENSORS["weight"], wrong) is rewritten
    assert is_rewritten(TENSORS["weight"].relu(), wrong.relu()) is rewritten, "half of the elements are zero"


def test_is_rewritten_false_for_a_stuck_bit_in_all_elements() -> None:
    stuck = (TENSORS["weight"].view(torch.int32) | 1 << 20).view(torch.float32)
    assert not is_rewritten(TENSORS["weight"], stuck)


# ---- a processor that is wrong in float64, too


def judged(world: World, judges: list[Arbitration | None], decision: Decision) -> Decision:
    """Let each replica's float64 run give its own judgement."""
    with patch.object(full_tensors, "arbitrate", lambda *_: judges[world.replica_id]):
        return settled(world, "mm", (A, B), [None, WRONG, None][: world.num_replicas], decision)


RIGHT, MISTAKEN = Arbitration([True, False], []), Arbitration([False, True], [])
DISTRUSTED = Arbitration([False, True], [], trusted=False)


@pytest.mark.parametrize(
    ("judges", "suspects", "cause", "code"),
    [
        ([RIGHT, MISTAKEN], [], "unexplained", "float64-disagrees"),
        ([RIGHT, MISTAKEN, None], [1], "persistent-fault", "float64-disagrees"),
        ([RIGHT, DISTRUSTED], [1], "persistent-fault", "float64-not-trusted"),
        ([DISTRUSTED, RIGHT, None], [1], "persistent-fault", "float64-not-trusted"),
    ],
)
def test_side_that_is_wrong_in_float64_does_not_decide(
    judges: list[Arbitration | None], suspects: list[int], cause: str, code: str
) -> None:
    groups = [[0, 2], [1]] if len(judges) == 3 else [[0], [1]]
    outvoted = [1] if len(judges) == 3 else []
    decisions = run_replicas(judged, len(judges), judges, found(suspects=outvoted, groups=groups))
    assert [(row.cause, row.suspects) for row in decisions] == [(cause, suspects)] * len(judges), decisions
    assert code in {line.code for line in decisions[0].evidence}
