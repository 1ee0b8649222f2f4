"""The decision tree, on made-up witnesses: each cause, and what looks like it but is not."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.decision import decide as decision_module
from dreplica.diagnosis.decision.conclude import with_remedy
from dreplica.diagnosis.decision.rules import HARDWARE, name_in
from dreplica.diagnosis.diagnose_run import as_verdict
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import Decision, Witness, first_difference, with_findings
from dreplica.diagnosis.evidence.provenance import Contents
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.environment.manifest import Difference
from dreplica.state.stages import STAGES
from tests.messages import codes, text_of


def digest(text: str) -> bytes:
    return text.encode().ljust(16, b".")[:16]


START = digest("start")
CONV = OpRecord("aten.convolution.default", "conv", "forward", START, digest("conv"), "")
RELU = OpRecord("aten.relu.default", "relu", "forward", digest("conv"), digest("relu"), "")
SGD = OpRecord("aten._foreach_add_.List", "", "optimizer", START + digest("relu"), digest("weight"), "")
GOOD = {stage: digest(stage) for stage in STAGES}


def witness(**changes: Any) -> Witness:
    """A replica on which nothing is wrong, with changes."""
    records = changes.pop("records", [CONV, RELU, SGD])
    contents = Contents(frozenset({START}), {"weights": {"weight": digest("weight")}})
    samples = [digest("a"), digest("b")]
    good = Witness(GOOD, GOOD, GOOD, records, None, contents, True, bytes(5056), False, samples)
    return replace(good, **changes)


def bad(*stages: str) -> dict[str, bytes]:
    return GOOD | {stage: digest(f"bad {stage}") for stage in stages}


def always(stages: dict[str, bytes], **changes: Any) -> Witness:
    """Return a replica that results in the same state each time."""
    return witness(original=stages, first=stages, second=stages, **changes)


def decide(witnesses: Sequence[Witness], overrides: Mapping[int, Any], differences: Sequence[Difference]) -> Decision:
    """Decide, and let the tensors that are compared afterwards show what a fault leaves: few bits, or a wrong result.

    What excludes hardware must already be among the findings then.
    """
    decision = decision_module.decide(witnesses, overrides, differences)
    if Kind.FEW_BITS not in decision.kinds:  # a generator's state is compared itself
        assert decision.cause not in HARDWARE, "digests alone do not accuse hardware"
    return name_in(with_findings(decision, Finding(Kind.FEW_BITS), Finding(Kind.PROVED_WRONG)))


def test_decide_unreproduced_fault_is_transient() -> None:
    for num_replicas in (2, 3, 4):
        witnesses = [witness() for _ in range(num_replicas)]
        witnesses[1] = witness(original=bad("weights"))
        decision = decide(witnesses, {}, [])
        assert (decision.cause, decision.suspects) == ("transient-fault", [1])


def test_decide_too_many_unreproduced_faults_are_unexplained() -> None:
    decision = decide([witness(original=bad("weights")), witness(original=bad("rng")), witness()], {}, [])
    assert decision.cause == "unexplained"
    assert decide([witness(original=bad("weights")), witness(original=bad("rng"))], {}, []).cause == "unexplained"


def test_decide_batch_differing_on_all_is_batch_differs() -> None:
    decision = decide([witness(original=bad("batch")), witness(original=GOOD | {"batch": digest("other")})], {}, [])
    assert decision.cause == "batch-differs"


def test_decide_self_divergence_in_operator_is_nondeterministic() -> None:
    other = replace(RELU, outputs=digest("relu again"))
    place = first_difference([CONV, RELU, SGD], [CONV, other, SGD])
    racy = witness(original=bad("output"), second=bad("output", "weights"), against_itself=place)
    decision = decide([witness(), racy], {}, [])
    assert (decision.cause, decision.suspects) == ("nondeterministic-operator", [1])
    assert decision.operator is not None
    assert decision.operator.record == RELU


def test_a_batch_that_differs_from_itself_is_no_operator() -> None:
    witnesses = [witness(), witness(original=bad("batch"), second=bad("batch", "weights"))]
    assert decide(witnesses, {}, []).cause == "batch-differs"


def test_decide_self_divergence_without_operator_is_unexplained() -> None:
    assert decide([witness(), witness(second=bad("weights"))], {}, []).cause == "unexplained"


def rounding() -> Witness:
    """Return a replica whose convolution has a different output for equal inputs, each time."""
    conv = replace(CONV, outputs=digest("conv'"))
    relu = replace(RELU, inputs=digest("conv'"), outputs=digest("relu'"))
    sgd = replace(SGD, inputs=START + digest("relu'"), outputs=digest("weight'"))
    contents = Contents(frozenset({START}), {"weights": {"weight": digest("weight'")}})
    return always(bad("output", "weights"), records=[conv, relu, sgd], contents=contents)


def test_decide_reproducible_wrong_result_is_persistent_fault() -> None:
    """Equal settings and the same different result each time are a persistent fault."""
    decision = decide([witness(), rounding(), witness()], {}, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])
    assert decision.operator is not None
    assert decision.operator.record == CONV
    assert decision.sides == (0, 1)


def test_a_declared_difference_explains_it() -> None:
    overrides = {1: {"determinism": {"threads": 2}}}
    decision = decide([witness(), rounding()], overrides, [])
    assert (decision.cause, decision.suspects) == ("declared-override", [1])


def test_a_declared_difference_on_another_replica_does_not() -> None:
    overrides = {2: {"determinism": {"threads": 2}}}
    decision = decide([witness(), rounding(), witness()], overrides, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_override_does_not_hide_memory_corruption() -> None:
    """The operator read what nothing had written: no setting does that."""
    relu = replace(RELU, inputs=digest("flipped"), outputs=digest("relu'"))
    corrupted = always(bad("output"), records=[CONV, relu, replace(SGD, inputs=START + digest("relu'"))])
    decision = decide([witness(), corrupted], {1: {"determinism": {"threads": 2}}}, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_other_hardware_explains_it_only_where_it_divides_alike() -> None:
    cards = Difference("device.name", ("A100", "H100", "A100"), allowed=True)
    assert decide([witness(), rounding(), witness()], {}, [cards]).cause == "environment-differs"
    cards = Difference("device.name", ("A100", "A100", "H100"), allowed=True)
    assert decide([witness(), rounding(), witness()], {}, [cards]).cause == "persistent-fault"
    hosts = Difference("host", ("a", "b", "a"), allowed=True)
    assert decide([witness(), rounding(), witness()], {}, [hosts]).cause == "persistent-fault"


def test_a_custom_operator_is_not_called_a_fault() -> None:
    """What it computes may depend on more than its inputs."""
    mine = OpRecord("mine.op.default", "", "forward", START, digest("conv"), "")
    other = replace(mine, outputs=digest("conv'"))
    witnesses = [witness(records=[mine, RELU, SGD]), always(bad("output"), records=[other, RELU, SGD])]
    assert decide(witnesses, {}, []).cause == "unexplained"


def test_decide_different_scalars_are_host_values() -> None:
    scaled = replace(CONV, scalars="2", outputs=digest("conv'"))
    decision = decide([witness(), always(bad("output"), records=[scaled, RELU, SGD])], {}, [])
    assert decision.cause == "host-value-differs"
    assert "operator-scalars-differ" in codes(decision.evidence)


def test_as_verdict_names_operator_with_unknown_input() -> None:
    other = replace(RELU, inputs=digest("outside"), outputs=digest("relu'"))
    found = Decision("unexplained", [], [], first_difference([CONV, RELU], [CONV, other]))
    (remedy,) = as_verdict(Verdict(False, "unexplained", "diverged", stage="output"), found).remedy
    assert remedy.code == "make-input-equal"
    assert str(remedy.data["operator"]).startswith(RELU.name)


@pytest.mark.parametrize("cause", HARDWARE)
def test_as_verdict_first_says_what_was_excluded(cause: str) -> None:
    """For any advice of the comparison: before hardware is replaced, what could not be excluded is looked for."""
    found = Verdict(False, "unexplained", "diverged", stage="weights", remedy=[Remedy.of("one-thread")])
    verdict = with_remedy(as_verdict(found, Decision(cause, [1], [])))
    assert codes(verdict.remedy)[0].startswith("excluded-")
    assert verdict.remedy[0].data["excluded"]


def test_as_verdict_keeps_cause_of_the_comparison() -> None:
    """With a frozen parameter, only some replicas have a gradient; replays show only a call with another flag."""
    found = Verdict(False, "structure-differs", "diverged", stage="gradients", remedy=[Remedy.of("one-thread")])
    seen = [Evidence.of("replays-agree")]
    verdict = as_verdict(found, Decision("unexplained", [], seen))
    assert (verdict.cause, verdict.evidence, codes(verdict.remedy)) == ("structure-differs", seen, ["one-thread"])
    assert as_verdict(found, Decision("declared-override", [], [])).cause == "declared-override"


def test_decide_other_generator_state_is_generators_differ() -> None:
    rand = OpRecord("aten.rand.generator", "drop", "forward", b"", digest("mask"), "", generator=digest("state"))
    other = replace(rand, generator=digest("state'"), outputs=digest("mask'"))
    decision = decide([witness(records=[rand, RELU]), always(bad("output"), records=[other, RELU])], {}, [])
    assert decision.cause == "generators-differ"
    assert "a generator in another state" in text_of(decision.evidence, "operator-inputs-differ")


def test_one_operator_more_is_another_structure_and_it_is_named() -> None:
    clamp = OpRecord("aten.clamp.default", "head", "forward", digest("relu"), digest("clamped"), "")
    longer = always(bad("output"), records=[CONV, RELU, clamp, SGD])
    decision = decide([witness(), longer], {}, [])
    assert decision.cause == "structure-differs"
    assert decision.operator is not None
    assert decision.operator.record == clamp


def test_decide_unwritten_weights_of_two_are_persistent_fault() -> None:
    """Weights that no operator wrote are a persistent fault, even between two replicas."""
    contents = Contents(frozenset({START}), {"weights": {"weight": digest("flipped")}})
    decision = decide([witness(), always(bad("weights"), contents=contents)], {}, [])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_other_data_on_one_replica_is_not_a_fault() -> None:
    corrupted = always(bad("batch", "output"), sample_digests=[digest("a"), digest("x")])
    decision = decide([witness(), corrupted, witness()], {}, [])
    assert (decision.cause, decision.suspects, decision.positions) == ("batch-differs", [1], [1])


def test_few_bits_of_a_generator_are_a_fault_many_are_not() -> None:
    flipped = bytes(30) + b"\x05" + bytes(5025)
    corrupted = always(bad("rng"), generator=flipped, generator_changed=True)
    for witnesses in ([witness(), corrupted, witness()], [witness(), corrupted]):
        decision = decide(witnesses, {}, [])
        assert (decision.cause, decision.suspects) == ("persistent-fault", [1])
    seeded_again = always(bad("rng"), generator=bytes([0b01010101]) * 5056, generator_changed=True)
    assert decide([witness(), seeded_again, witness()], {}, []).cause == "unexplained"


def test_decide_rng_changed_by_operators_is_not_corrupted() -> None:
    flipped = always(bad("rng"), generator=bytes(30) + b"\x05" + bytes(5025))
    assert decide([witness(), flipped, witness()], {}, []).cause == "unexplained"


def test_decide_rng_changed_on_all_replicas_is_not_corrupted() -> None:
    """Generators changed outside operators on all replicas are not corrupted."""
    one = always(GOOD, generator_changed=True)
    other = always(bad("rng"), generator=bytes(30) + b"\x05" + bytes(5025), generator_changed=True)
    assert decide([one, other], {}, []).cause == "unexplained"


def test_decide_inconsistent_replays_are_unexplained() -> None:
    """Replays that differ from the original and between replicas leave the cause unexplained."""
    muddle = witness(original=bad("weights"), first=bad("rng"), second=bad("rng"))
    assert decide([witness(), muddle, witness()], {}, []).cause == "unexplained"
