"""The decision tree finds the cause of the first difference and reports other differences in the step as evidence."""

from dataclasses import replace
from typing import Any

import pytest

from dreplica.diagnosis.evidence.observation import Decision, Witness, difference_behind, first_difference
from dreplica.diagnosis.evidence.provenance import Contents
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from tests.diagnosis.decision.test_decide import (
    CONV,
    GOOD,
    RELU,
    SGD,
    START,
    always,
    bad,
    decide,
    digest,
    rounding,
    witness,
)
from tests.messages import texts

LOGGED = OpRecord("aten.mean.default", "", "forward", digest("conv"), digest("mean"), "model.py:7")
LR = {"optim": {"lr": 0.2}}
SLOWER = replace(SGD, scalars="0.2", outputs=digest("weight, slower"))


def slower(**changes: Any) -> Witness:
    """A replica with another learning rate, which shows in the optimizer's settings and in the weights."""
    return always(bad("optimizer", "weights"), records=[CONV, RELU, SLOWER], **changes)


def has_line(decision: Decision, text: str) -> bool:
    return any(text in line for line in texts(decision.evidence))


# ---- two things in one step


def test_first_stage_transient_fault_before_persistent_fault() -> None:
    """A transient fault is the verdict where a persistent fault of another replica shows later."""
    contents = Contents(frozenset({START}), {"weights": {"weight": digest("flipped")}})
    corrupted = always(bad("weights"), contents=contents)
    decision = decide([witness(), witness(original=bad("batch", "output", "weights")), corrupted], {}, [])
    assert (decision.cause, decision.suspects) == ("transient-fault", [1])
    assert decision.groups == [[0, 2], [1]]
    assert has_line(decision, "replays also differ between replicas, first in weights")


def test_first_stage_persistent_fault_before_transient_fault() -> None:
    """A persistent fault is the verdict where a transient fault of another replica shows later."""
    decision = decide([witness(), witness(original=bad("weights")), rounding()], {}, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [2])
    assert decision.groups == [[0, 1], [2]]
    assert has_line(decision, "replica 1's replays also differ from the original, first in weights")


def test_first_stage_persistent_fault_before_another() -> None:
    contents = Contents(frozenset({START}), {"weights": {"weight": digest("flipped")}})
    decision = decide([witness(), always(bad("weights"), contents=contents), rounding()], {}, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [2])
    assert decision.operator is not None
    assert decision.operator.record == CONV
    assert decision.sides == (0, 2)
    assert has_line(decision, "later in the step, in weights, the replicas split into more groups")


@pytest.mark.parametrize("corrupted", [1, 2])
def test_first_stage_transient_fault_before_override(corrupted: int) -> None:
    witnesses = [witness(), slower(), witness()]
    witnesses[corrupted] = replace(witnesses[corrupted], original=bad("output", "gradients", "optimizer", "weights"))
    decision = decide(witnesses, {1: LR}, [])
    assert (decision.cause, decision.suspects) == ("transient-fault", [corrupted])


def test_first_stage_override_before_fault_of_other_replica() -> None:
    rng = bytes(30) + b"\x05" + bytes(5025)
    corrupted = always(bad("rng"), generator=rng, generator_changed=True)
    decision = decide([witness(), slower(), corrupted], {1: LR}, [])
    assert (decision.cause, decision.suspects) == ("declared-override", [1])
    assert has_line(decision, "in rng, the replicas split into more groups")


def test_first_stage_reproducible_though_later_stage_varies() -> None:
    """Replays that vary only in a later stage still reproduce the first difference."""
    again = replace(SGD, outputs=digest("weight again"))
    place = first_difference([CONV, RELU, SGD], [CONV, RELU, again])
    racy = witness(second=bad("weights"), against_itself=place)
    decision = decide([racy, rounding(), witness()], {}, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_first_stage_new_difference_invalidates_replays() -> None:
    """Replays with a difference that the original did not have are no evidence."""
    astray = always(bad("output"), records=rounding().records)
    astray = replace(astray, first=bad("output", "rng"), second=bad("output", "rng"))
    decision = decide([witness(), astray, witness()], {}, [])
    assert (decision.cause, decision.suspects) == ("unexplained", [1])


# ---- the operator that has to do with it


def test_first_stage_ignores_operator_without_effect_on_weights() -> None:
    """One replica logs an additional mean; the weights diverge in the optimizer's call."""
    other = replace(LOGGED, outputs=digest("another mean"))
    records = [CONV, LOGGED, RELU, SGD]
    slow = always(bad("weights"), records=[CONV, other, RELU, replace(SGD, outputs=digest("weight'"))])
    decision = decide([witness(records=records), slow, witness(records=records)], {}, [])
    assert decision.operator is not None
    assert decision.operator.record == SGD


def test_first_stage_ignores_extra_operator_without_effect() -> None:
    """An additional operator without effect on the weights is not the structure difference."""
    contents = Contents(frozenset({START}), {"weights": {"weight": digest("flipped")}})
    corrupted = always(bad("weights"), records=[CONV, LOGGED, RELU, SGD], contents=contents)
    decision = decide([witness(), corrupted, witness()], {}, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])
    assert decision.operator is None
    assert has_line(decision, "is the first that differs, but does not affect weights")


def test_what_an_operator_gave_does_not_explain_a_generator() -> None:
    one, other = (witness(records=[CONV, row, SGD]) for row in (RELU, replace(RELU, outputs=digest("dead"))))
    other = replace(other, original=bad("rng"), first=bad("rng"), second=bad("rng"))
    decision = decide([one, other, one], {}, [])
    assert decision.cause == "unexplained"
    assert decision.operator is None


def test_first_stage_ignores_unrelated_racy_operator() -> None:
    place = first_difference([CONV, RELU], [CONV, replace(RELU, outputs=digest("again"))])
    racy = witness(second=bad("weights"), against_itself=place)
    decision = decide([racy, witness(original=bad("weights")), witness()], {}, [])
    assert decision.cause == "unexplained"
    assert decision.operator is None


def test_difference_behind_skips_what_shows_elsewhere() -> None:
    one = [CONV, RELU, SGD]
    other = [replace(CONV, outputs=digest("x")), RELU, replace(SGD, outputs=digest("y"))]
    behind = {stage: difference_behind(one, other, stage) for stage in ("output", "weights", "batch", "rng", None)}
    assert {stage: place.index if place else None for stage, place in behind.items()} == {
        "output": 0,
        "weights": 2,
        "batch": 0,
        "rng": 0,
        None: 0,
    }
    assert difference_behind(one, [CONV, replace(RELU, outputs=digest("x")), SGD], "optimizer") is None


# ---- the sides


def test_structure_of_suspect_is_named_with_its_source() -> None:
    mine = replace(RELU, name="aten.gelu.default", source="model.py:12")
    odd = always(bad("output"), records=[CONV, mine, SGD])
    for witnesses, suspect in (([witness(), odd, witness()], 1), ([odd, witness(), witness()], 0)):
        decision = decide(witnesses, {}, [])
        assert (decision.cause, decision.suspects) == ("structure-differs", [suspect])
        assert decision.operator is not None
        assert decision.operator.record == mine
        assert has_line(decision, f"aten.gelu.default in relu (forward) at model.py:12 on replica {suspect}")


def test_three_results_of_two_structures_have_no_single_cause() -> None:
    """One replica casts, as declared, and another computes wrongly: three results of two structures."""
    casting = [always(GOOD | {"output": digest(f"{n} casts")}, records=[LOGGED] * n + [CONV, RELU]) for n in (1, 2)]
    witnesses = [witness(records=[CONV, RELU]), casting[0], rounding()]
    decision = decide(witnesses, {1: {"train": {"amp": "bf16"}}}, [])
    assert (decision.cause, decision.suspects) == ("unexplained", [])
    assert decide([witnesses[0], *casting], {}, []).cause == "structure-differs"


def test_suspect_is_minority_if_no_replica_reproduces_itself() -> None:
    sides = [witness(second=bad("output")) for _ in range(3)]
    sides[2] = replace(sides[2], original=bad("output"))
    assert decide(sides, {}, []).suspects == [2]
    assert decide([replace(row, unreproduced=2) for row in sides], {}, []).suspects == [2]
    place = first_difference([CONV, RELU], [CONV, replace(RELU, outputs=digest("again"))])
    decision = decide([replace(row, against_itself=place) for row in sides], {}, [])
    assert (decision.cause, decision.suspects) == ("nondeterministic-operator", [0, 1, 2])


# ---- declared differences that can have made it, and those that cannot


@pytest.mark.parametrize(
    "override",
    [LR, {"schedule": {"gamma": 0.5}}, {"criterion": {"label_smoothing": 0.1}}, {"train": {"grad_clip": 1.0}}],
)
def test_rounding_is_not_explained_by_numeric_setting(override: dict[str, Any]) -> None:
    """A rounding difference is not attributed to a setting that is only a number."""
    decision = decide([witness(), rounding(), witness()], {1: override}, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])
    assert not has_line(decision, "the same on all replicas")


@pytest.mark.parametrize(
    "override",
    [
        {"determinism": {"onednn": False}},
        {"world": {"device": "cuda"}},
        {"train": {"amp": "bf16"}},
        {"model": {"channels_last": True}},
        {"model": {"factory": "mine:model"}},
        {"replica": {"factory": "mine:replica"}},
        {**LR, "determinism": {"onednn": False}},
    ],
)
def test_what_rounds_otherwise_may_be_declared(override: dict[str, Any]) -> None:
    decision = decide([witness(), rounding(), witness()], {1: override}, [])
    assert (decision.cause, decision.suspects) == ("declared-override", [1])


def test_optimizer_setting_explains_only_the_optimizer_stage() -> None:
    """An optimizer setting explains a difference in its call, and none in a forward pass."""
    decision = decide([witness(), slower(), witness()], {1: LR}, [])
    assert (decision.cause, decision.suspects) == ("declared-override", [1])
    longer = [CONV, RELU, replace(RELU, name="aten.clamp.default", module="head"), SGD]
    decision = decide([witness(), always(bad("output"), records=longer), witness()], {1: LR}, [])
    assert (decision.cause, decision.suspects) == ("structure-differs", [1])


@pytest.mark.parametrize("override", [{"checkpoint": {"keep": 1}}, {"run": {"resume": "never"}}])
def test_a_setting_that_no_replay_reads_explains_nothing(override: dict[str, Any]) -> None:
    decision = decide([witness(), slower(), witness()], {1: override}, [])
    assert (decision.cause, decision.suspects) == ("host-value-differs", [1])


def test_setting_may_explain_difference_of_uncompared_step() -> None:
    """A setting may have taken effect in an earlier step that was not compared."""
    reads = replace(CONV, inputs=digest("other weight"), outputs=digest("conv'"))
    contents = Contents(frozenset({digest("other weight")}), {})
    decision = decide([witness(), always(bad("output"), records=[reads], contents=contents)], {1: LR}, [])
    assert (decision.cause, decision.suspects) == ("declared-override", [1])


def test_the_good_witness_is_good() -> None:
    assert always(GOOD) == witness()
