"""The order of an operator's inputs as a cause, and what it must not be mistaken for."""

from typing import Any

import pytest

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.decision.decide_layout import explained_by_order, order_behind, structure_verdict
from dreplica.diagnosis.replay.state_layout import Structure
from dreplica.diagnosis.tracing.op_tracer import OpRecord


def op(name: str, inputs: str, outputs: str, scalars: str = "") -> OpRecord:
    """Return a record whose tensors are letters."""
    read, made = (b"".join(letter.encode() * 16 for letter in text) for text in (inputs, outputs))
    return OpRecord(name, "", "optimizer", read, made, "", scalars)


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [
        # The norms are the same ones; the sum over them is not.
        ([op("norm", "ab", "xy"), op("sum", "xy", "s")], [op("norm", "ba", "yx"), op("sum", "yx", "t")], 1),
        # One operator for each parameter, in reverse.
        (
            [op("norm", "a", "x"), op("norm", "b", "y"), op("sum", "xy", "s")],
            [op("norm", "b", "y"), op("norm", "a", "x"), op("sum", "yx", "t")],
            2,
        ),
        # The order changes nothing.
        ([op("norm", "ab", "xy"), op("sum", "xy", "s")], [op("norm", "ba", "yx"), op("sum", "yx", "s")], None),
        # The same operator on the same inputs gives something else: it is not the order.
        ([op("norm", "a", "x"), op("sum", "xy", "s")], [op("norm", "a", "z"), op("sum", "yx", "t")], None),
        # Other inputs, and not in another order.
        ([op("sum", "ab", "s")], [op("sum", "ac", "t")], None),
        ([op("sum", "aab", "s")], [op("sum", "abb", "t")], None),
        # The same tensors in another order, to another operator or with another number.
        ([op("sum", "ab", "s")], [op("mean", "ba", "t")], None),
        ([op("sum", "ab", "s", "1")], [op("sum", "ba", "t", "2")], None),
        ([], [], None),
    ],
)
def test_order_is_behind_results_of_permuted_inputs(one: Any, other: Any, index: int | None) -> None:
    place = order_behind(one, other)
    assert (None if place is None else place.index) == index


def finding(**changes: Any) -> Verdict:
    return Verdict(False, "unexplained", "diverged", step=3, epoch=1).with_(**changes)


def test_structure_does_not_explain_other_samples() -> None:
    line = Evidence.of("objects-differ", places="optimizer: A on replica 0; B on replica 1")
    structure = Structure("structure-differs", line, "optimizer", "0.weight", ("A", "B", "B"))
    verdict = structure_verdict(structure, finding(stage="weights"))
    assert (verdict.cause, verdict.step, verdict.epoch, verdict.suspects) == ("structure-differs", 3, 1, [0])
    assert (verdict.stage, verdict.tensor, verdict.groups) == ("optimizer", "0.weight", [[1, 2], [0]])
    for stage in ("indices", "batch"):
        verdict = structure_verdict(structure, finding(stage=stage))
        assert (verdict.cause, verdict.stage) == ("unexplained", stage)
        assert [item.code for item in verdict.evidence] == ["objects-differ", "stage-not-explained"]


@pytest.mark.parametrize(
    ("found", "explained"),
    [
        (None, True),
        (finding(stage="optimizer"), True),
        (finding(stage="optimizer", tensor="0.weight"), False),
        (finding(), False),
    ],
)
def test_order_alone_explains_entries_in_another_order(found: Verdict | None, explained: bool) -> None:
    assert explained_by_order(found) == explained
