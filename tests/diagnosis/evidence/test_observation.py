"""Where two records of a step part, and what may be said of that place."""

from dataclasses import replace

from dreplica.diagnosis.evidence.observation import OpDifference, first_difference
from dreplica.diagnosis.tracing.op_tracer import OpRecord


def record(name: str, inputs: bytes = b"i", outputs: bytes = b"", scalars: str = "") -> OpRecord:
    return OpRecord(f"aten.{name}.default", name, "forward", inputs, outputs or name.encode(), "", scalars)


A, B, C, D = (record(name) for name in "abcd")


def test_equal_records_have_no_difference() -> None:
    assert first_difference([A, B, C], [A, B, C]) is None
    assert first_difference([], []) is None


def test_first_difference_ignores_source_and_view_contents() -> None:
    assert first_difference([A], [replace(A, source="model.py:3", shows=b"other")]) is None


def test_other_outputs_are_made_by_the_operator() -> None:
    place = first_difference([A, B, C], [A, replace(B, outputs=b"x"), replace(C, inputs=b"x")])
    assert place is not None
    assert place.index == 1
    assert place.made_here
    assert place.record is B


def test_other_inputs_are_not_made_by_the_operator() -> None:
    place = first_difference([A, B], [A, replace(B, inputs=b"x", outputs=b"x")])
    assert place is not None
    assert (place.index, place.same_structure, place.same_call) == (1, True, True)
    assert not place.inputs_agree
    assert not place.made_here


def test_other_inputs_count_though_the_outputs_agree() -> None:
    place = first_difference([A, B], [A, replace(B, inputs=b"x")])
    assert place is not None
    assert place.index == 1


def test_other_numbers_are_another_call_of_the_same_operator() -> None:
    place = first_difference([A], [replace(A, scalars="2", outputs=b"x")])
    assert place is not None
    assert place.same_structure
    assert place.inputs_agree
    assert not place.same_call
    assert not place.made_here


def test_name_module_and_phase_make_the_structure() -> None:
    for other in (replace(A, name="aten.z.default"), replace(A, module="z"), replace(A, phase="backward")):
        place = first_difference([A], [other])
        assert place is not None
        assert not place.same_structure


def test_first_difference_names_extra_operator_of_either_side() -> None:
    for one, other in (([A, B, C], [A, B, D, C]), ([A, B, D, C], [A, B, C])):
        place = first_difference(one, other)
        assert place is not None
        assert place.index == 2
        assert place.extra is D
        assert place.record is D
        assert not place.same_structure


def test_another_operator_in_its_place_is_not_an_extra_one() -> None:
    place = first_difference([A, B, C], [A, D, C])
    assert place is not None
    assert place.extra is None
    assert place.record is B


def test_a_record_that_ends_early_parts_at_its_end() -> None:
    for one, other, sides in (([A], [A, B], (None, B)), ([A, B], [A], (B, None))):
        place = first_difference(one, other)
        assert place is not None
        assert (place.index, place.one, place.other) == (1, *sides)
        assert place.record is B
        assert [place.same_structure, place.inputs_agree, place.same_call, place.made_here] == [False] * 4


def test_of_several_differences_the_first_counts() -> None:
    place = first_difference([A, B, C], [replace(A, outputs=b"x"), D, C])
    assert place == OpDifference(0, A, replace(A, outputs=b"x"))
