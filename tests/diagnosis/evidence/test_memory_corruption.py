"""Memory changed outside operators is distinguished from code that bypasses the dispatcher."""

from dataclasses import replace

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Kind
from dreplica.diagnosis.evidence.memory_corruption import find_corruption
from dreplica.diagnosis.evidence.observation import Decision, Witness, first_difference
from dreplica.diagnosis.evidence.provenance import Contents
from dreplica.diagnosis.tracing.memory_tracker import OUTSIDE, STATE
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from tests.diagnosis.decision.test_decide import CONV, GOOD, RELU, SGD, START, always, bad, digest, witness
from tests.messages import data_of, text_of

CLASSES = [[0, 2], [1]]
FLIPPED_WEIGHTS = Contents(frozenset({START}), {"weights": {"weight": digest("flipped")}})


BEFORE = Evidence.of("replays-reproduce")


def found(one: Witness, other: Witness, suspects: list[int]) -> Decision:
    return Decision(
        "unexplained",
        suspects,
        [BEFORE],
        first_difference(one.records, other.records),
        groups=CLASSES,
    )


def corruption(decision: Decision, witnesses: list[Witness], stage: str | None) -> Decision | None:
    """Return the decision if some replicas' memory was changed, None if not."""
    after = find_corruption(decision, witnesses, stage)
    return after if Kind.MEMORY_CHANGED in after.kinds else None


def reads(inputs: bytes) -> Witness:
    relu = replace(RELU, inputs=inputs, outputs=digest("relu'"))
    return always(bad("output"), records=[CONV, relu, replace(SGD, inputs=START + digest("relu'"))])


def test_nothing_is_struck_where_everything_was_written() -> None:
    rounded = replace(CONV, outputs=digest("conv'"))
    other = always(bad("output"), records=[rounded, replace(RELU, inputs=digest("conv'"))])
    assert corruption(found(witness(), other, [1]), [witness(), other, witness()], "output") is None


def test_unwritten_input_names_the_replica_and_last_writer() -> None:
    corrupted = reads(digest("flipped"))
    decision = corruption(found(witness(), corrupted, [1]), [witness(), corrupted, witness()], "output")
    assert decision is not None
    assert decision.suspects == [1]
    assert decision.operator is not None
    assert decision.operator.record == CONV
    assert decision.evidence[0].code == "replays-reproduce"
    assert data_of(decision.evidence, "operator-read-changed-memory") == {"replica": 1, "index": 1}
    assert "aten.convolution.default" in text_of(decision.evidence, "memory-writer")


def test_suspect_of_two_is_the_corrupted_replica() -> None:
    corrupted = reads(digest("flipped"))
    for witnesses, suspect in (([witness(), corrupted], 1), ([corrupted, witness()], 0)):
        one = replace(found(*witnesses, []), groups=[[0], [1]])
        decision = corruption(one, witnesses, "output")
        assert decision is not None
        assert decision.suspects == [suspect]


def test_corrupted_images_were_written_by_no_operator() -> None:
    conv = replace(CONV, inputs=digest("corrupted"), outputs=digest("conv'"))
    corrupted = always(bad("batch"), records=[conv])
    decision = corruption(found(witness(), corrupted, [1]), [witness(), corrupted, witness()], "batch")
    assert decision is not None
    assert decision.operator is None


def test_what_a_view_shows_of_known_contents_is_known() -> None:
    """A view of known contents is known; a view of corrupted memory is not."""
    for viewed, is_known in ((digest("conv"), True), (digest("nowhere"), False)):
        view = OpRecord("aten.t.default", "", "forward", b"[(2, 3)]", b"[(3, 2)]", "", shows=viewed + digest("turned"))
        sound = witness(records=[CONV, view, replace(RELU, inputs=digest("turned, sound"))])
        other = always(bad("output"), records=[CONV, view, replace(RELU, inputs=digest("turned"))])
        sound = replace(sound, contents=Contents(frozenset({START, digest("turned, sound")}), {}))
        decision = corruption(found(sound, other, [1]), [sound, other, sound], "output")
        assert (decision is None) is is_known


def test_what_was_left_counts_by_stage() -> None:
    corrupted = always(bad("weights"), contents=FLIPPED_WEIGHTS)
    rows = [witness(), corrupted, witness()]
    decision = corruption(found(witness(), corrupted, [1]), rows, "weights")
    assert decision is not None
    assert data_of(decision.evidence, "memory-changed") == {"replica": 1, "names": ["weight"], "stage": "weights"}
    assert corruption(found(witness(), corrupted, [1]), rows, "buffers") is None
    assert corruption(found(witness(), corrupted, [1]), rows, None) is None


def test_contents_unaccounted_on_all_are_outside_inputs() -> None:
    """A closure's tensor is read on every replica, and on one it holds something else."""
    rows = [reads(digest(name)) for name in ("closure", "other", "closure")]
    decision = find_corruption(found(rows[0], rows[1], [1]), rows, "output")
    assert decision.kinds == {Kind.OUTSIDE_INPUT}
    assert (decision.suspects, decision.corrupted) == ([1], None)


def test_memory_from_outside_of_the_step_is_not_corrupted() -> None:
    """A closure's tensor that is zero on the other replicas, as the contents of some known tensor are."""
    for origin, kinds in ((OUTSIDE, {Kind.OUTSIDE_INPUT}), (0, {Kind.MEMORY_CHANGED}), (STATE, {Kind.MEMORY_CHANGED})):
        row = reads(digest("other"))
        relu = replace(row.records[1], origins=(origin,))
        row = replace(row, records=[row.records[0], relu, *row.records[2:]])
        rows = [witness(), row, witness()]
        assert find_corruption(found(witness(), row, [1]), rows, "output").kinds == kinds


def test_changed_indices_are_few_bits_if_they_are() -> None:
    for bits, few in ((3, True), (9, False)):
        rows = [witness(), always(bad("indices"), indices_intact=False, indices_bits=bits)]
        decision = find_corruption(found(*rows, []), rows, "indices")
        assert Kind.MEMORY_CHANGED in decision.kinds
        assert (Kind.FEW_BITS in decision.kinds) is few


def test_what_all_have_in_common_is_no_fault() -> None:
    rows = [always(GOOD | {"weights": digest(str(i))}, contents=FLIPPED_WEIGHTS) for i in range(3)]
    assert corruption(found(rows[0], rows[1], []), rows, "weights") is None
    rows = [replace(row, indices_intact=False) for row in rows]
    assert corruption(found(rows[0], rows[1], []), rows, "weights") is None


def test_two_of_four_may_be_corrupted_but_not_most_replicas() -> None:
    """What most replicas do is what the code does; the minority deviates."""
    corrupted = always(bad("weights"), contents=FLIPPED_WEIGHTS)
    decision = corruption(found(witness(), corrupted, []), [corrupted, corrupted, witness(), witness()], "weights")
    assert decision is not None
    assert decision.suspects == [0, 1]
    assert corruption(found(witness(), corrupted, []), [corrupted, corrupted, witness()], "weights") is None
    read = reads(digest("flipped"))
    assert corruption(found(witness(), read, []), [read, witness(), read], "output") is None


def test_unwritten_but_equal_contents_are_not_corrupted() -> None:
    """All replicas have the same hook through NumPy; on one of them another weight is corrupted."""
    hooked = Contents(frozenset({START}), {"weights": {"bias": digest("hook"), "weight": digest("weight")}})
    flipped = Contents(frozenset({START}), {"weights": {"bias": digest("hook"), "weight": digest("flipped")}})
    rows = [witness(contents=hooked), always(bad("weights"), contents=flipped), witness(contents=hooked)]
    decision = corruption(found(rows[0], rows[1], [1]), rows, "weights")
    assert decision is not None
    assert decision.suspects == [1]
    assert decision.corrupted is not None
    assert decision.corrupted.tensor == "weight"
    assert data_of(decision.evidence, "memory-changed")["names"] == ["weight"]
