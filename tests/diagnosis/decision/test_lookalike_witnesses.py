"""The decision tree on witnesses that are nearly those of a cause, and not quite: the other cause, or `unexplained`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dreplica.diagnosis.evidence.observation import Decision, Witness, first_difference
from dreplica.diagnosis.evidence.provenance import Contents
from dreplica.diagnosis.tracing.memory_tracker import OUTSIDE
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.environment.manifest import Difference
from tests.diagnosis.decision.test_decide import CONV, GOOD, RELU, SGD, START, always, bad, decide, digest, witness
from tests.messages import codes, data_of

THREADS = {"determinism": {"threads": 2}}
ONEDNN = {"determinism": {"onednn": False}}
MINE = OpRecord("mine.op.default", "", "forward", START, digest("conv"), "")


def rounding(mark: str = "'") -> Witness:
    """Return a replica whose convolution has a different output for equal inputs, each time."""
    conv = replace(CONV, outputs=digest(f"conv{mark}"))
    relu = replace(RELU, inputs=digest(f"conv{mark}"), outputs=digest(f"relu{mark}"))
    sgd = replace(SGD, inputs=START + digest(f"relu{mark}"), outputs=digest(f"weight{mark}"))
    contents = Contents(frozenset({START}), {"weights": {"weight": digest(f"weight{mark}")}})
    stages = GOOD | {"output": digest(f"output{mark}"), "weights": digest(f"weights{mark}")}
    return always(stages, records=[conv, relu, sgd], contents=contents)


def decided(
    *witnesses: Witness, overrides: Mapping[int, Any] | None = None, differences: Sequence[Difference] = ()
) -> Decision:
    return decide(witnesses, overrides or {}, differences)


def cards(*names: str) -> Difference:
    return Difference("device.name", names, allowed=True)


# ---- declared-override


@pytest.mark.parametrize(
    ("overrides", "cause", "suspects"),
    [
        ({1: THREADS}, "persistent-fault", [2]),
        ({0: THREADS}, "persistent-fault", [2]),
        ({0: THREADS, 1: THREADS}, "declared-override", [0, 1]),
    ],
)
def test_an_override_of_one_and_the_difference_of_another(
    overrides: dict[int, Any], cause: str, suspects: list[int]
) -> None:
    decision = decided(witness(), witness(), rounding(), overrides=overrides)
    assert (decision.cause, decision.suspects) == (cause, suspects)


def test_override_shared_across_groups_explains_nothing() -> None:
    """An override shared by a group and by a replica outside it explains nothing."""
    decision = decided(witness(), rounding(), witness(), overrides={1: THREADS, 2: THREADS})
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_an_empty_override_declares_nothing() -> None:
    assert decided(witness(), rounding(), witness(), overrides={1: {}}).cause == "persistent-fault"


def test_override_with_transient_fault_is_unexplained() -> None:
    """A declared difference and a transient fault in the same stage are unexplained."""
    both = replace(rounding(), original=bad("weights", "output"))
    decision = decided(witness(), both, witness(), overrides={1: THREADS})
    assert (decision.cause, decision.suspects) == ("unexplained", [1])


def test_override_without_effect_does_not_hide_transient_fault() -> None:
    decision = decided(witness(), witness(original=bad("weights")), witness(), overrides={1: THREADS})
    assert (decision.cause, decision.suspects) == ("transient-fault", [1])


def test_override_must_divide_replicas_as_the_groups_do() -> None:
    """An override on two of four replicas explains two groups of two; on one or three it does not."""
    pairs = [witness(), witness(), rounding(), rounding()]
    decision = decided(*pairs, overrides={2: THREADS, 3: THREADS})
    assert (decision.cause, decision.suspects) == ("declared-override", [2, 3])
    assert decided(*pairs, overrides={2: THREADS}).cause != "declared-override"
    assert decided(*pairs, overrides={1: THREADS, 2: THREADS, 3: THREADS}).cause != "declared-override"


def test_override_without_effect_is_not_suspected() -> None:
    """Of two declared differences, only the one with an effect makes a suspect."""
    decision = decided(witness(), witness(), rounding(), overrides={1: THREADS, 2: ONEDNN})
    assert (decision.cause, decision.suspects) == ("declared-override", [2])


def test_a_number_of_workers_explains_no_operator() -> None:
    """Replays load in the training process regardless of data.num_workers, and reproduce the difference."""
    decision = decided(witness(), rounding(), witness(), overrides={1: {"data": {"num_workers": 2}}})
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_override_with_undeclared_difference_is_unexplained() -> None:
    """A declared difference of one replica and an undeclared one of another are not a fault."""
    decision = decided(witness(), rounding(), rounding("''"), overrides={1: THREADS})
    assert decision.cause == "unexplained"


# ---- environment-differs


def test_hardware_must_divide_replicas_as_the_groups_do() -> None:
    """Different hardware explains only groups that it divides in the same way."""
    pairs = [witness(), witness(), rounding(), rounding()]
    assert decided(*pairs, differences=[cards("A", "A", "B", "B")]).cause == "environment-differs"
    assert decided(*pairs, differences=[cards("A", "B", "A", "B")]).cause == "persistent-fault"
    assert decided(*pairs, differences=[cards("A", "A", "A", "B")]).cause == "persistent-fault"
    assert decided(*pairs, differences=[cards("A", "B", "C", "D")]).cause == "environment-differs"


def test_hardware_does_not_explain_memory_corruption() -> None:
    contents = Contents(frozenset({START}), {"weights": {"weight": digest("flipped")}})
    corrupted = always(bad("weights"), contents=contents)
    decision = decided(witness(), corrupted, differences=[cards("A", "B")])
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_other_hardware_does_not_explain_other_data() -> None:
    other = always(bad("batch"), sample_digests=[digest("a"), digest("x")])
    assert decided(witness(), other, differences=[cards("A", "B")]).cause == "batch-differs"


@pytest.mark.parametrize("field", ["host", "device.uuid", "device.index", "device.shared", "seed"])
def test_what_does_not_round_is_no_environment_to_blame(field: str) -> None:
    decision = decided(witness(), rounding(), witness(), differences=[Difference(field, (0, 1, 0), allowed=True)])
    assert decision.cause == "persistent-fault"


def test_the_evidence_does_not_call_the_same_what_differs() -> None:
    decision = decided(witness(), rounding(), witness(), differences=[cards("A", "A", "B")])
    assert "settings-and-environment-equal" not in codes(decision.evidence)


# ---- persistent-fault


def test_operator_difference_without_majority_has_no_suspect() -> None:
    for count in (1, 2):
        decision = decided(*[witness()] * count, *[rounding()] * count)
        assert (decision.cause, decision.suspects) == ("persistent-fault", [])
        assert decision.sides == (0, count), "left to arbitration"


def test_unwritten_inputs_on_all_replicas_are_not_corruption() -> None:
    """NumPy in the forward pass: no operator has written what the next one reads, on any replica."""
    relus = [replace(RELU, inputs=digest(f"numpy {rank}"), outputs=digest(f"relu {rank}")) for rank in range(3)]
    sides = [
        always(GOOD | {"output": digest(f"output {rank}")}, records=[CONV, relu]) for rank, relu in enumerate(relus)
    ]
    decision = decided(*sides)
    assert (decision.cause, decision.suspects) == ("unexplained", [])


def test_unwritten_weights_on_all_replicas_are_not_corruption() -> None:
    sides = []
    for rank in range(3):
        contents = Contents(frozenset({START}), {"weights": {"weight": digest(f"hook {rank}")}})
        sides.append(always(GOOD | {"weights": digest(f"weights {rank}")}, contents=contents))
    assert decided(*sides).cause == "unexplained"


def test_changed_indices_are_a_fault_between_two_replicas() -> None:
    corrupted = always(bad("indices", "batch"), indices_intact=False, sample_digests=[digest("a"), digest("b")])
    decision = decided(witness(), corrupted)
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])
    assert "indices-changed" in codes(decision.evidence)


def test_a_batch_changed_after_loading_is_not_other_data() -> None:
    conv = replace(CONV, inputs=digest("corrupted"), outputs=digest("conv'"))
    corrupted = always(bad("batch", "output"), records=[conv])
    decision = decided(witness(records=[CONV]), corrupted, witness(records=[CONV]))
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])
    assert decision.operator is None, "no operator had written it"


def test_custom_operator_is_unexplained_despite_majority() -> None:
    other = replace(MINE, outputs=digest("conv'"))
    sides = [witness(records=[MINE]), always(bad("output"), records=[other]), witness(records=[MINE])]
    decision = decided(*sides)
    assert (decision.cause, decision.suspects) == ("unexplained", [1])


# ---- transient-fault


def test_difference_gone_in_all_replays_has_no_suspect() -> None:
    """All replays reproduce the original on all replicas, which then cannot have diverged."""
    decision = decided(witness(), witness(), witness())
    assert (decision.cause, decision.suspects) == ("unexplained", [])


def test_two_of_five_moved_are_two_faults_and_three_are_too_many() -> None:
    moved = [witness(original=bad("weights")), witness(original=bad("rng"))]
    decision = decided(*moved, witness(), witness(), witness())
    assert (decision.cause, decision.suspects) == ("transient-fault", [0]), "the first in causal order"
    assert decision.groups == [[1, 2, 3, 4], [0]]
    assert data_of(decision.evidence, "later-replay-differs") == {"replica": 1, "stage": "rng"}
    decision = decided(*moved, witness(original=bad("gradients")), witness(), witness())
    assert (decision.cause, decision.suspects) == ("unexplained", [0, 1, 2])


def test_same_change_on_most_replicas_is_unexplained() -> None:
    """Replicas with the same change are not outvoted by the one that replays as it ran."""
    moved = [witness(original=bad("weights"))] * 2
    assert decided(*moved, witness()).cause == "unexplained"


def test_only_random_samples_of_workers_excuse_the_batch() -> None:
    """A batch that no replay reproduces is a fault, except for random samples of workers."""
    original = bad("batch", "output")
    workers = witness(original=original, loaded_by_workers=True, samples_are_random=True)
    assert decided(witness(), workers, witness()).cause == "batch-differs"
    for fixed in ({"samples_are_random": True}, {"loaded_by_workers": True}, {}):
        decision = decided(witness(), witness(original=original, **fixed), witness())
        assert (decision.cause, decision.suspects) == ("transient-fault", [1])


def test_workers_do_not_excuse_weights() -> None:
    corrupted = witness(original=bad("weights"), loaded_by_workers=True, samples_are_random=True)
    decision = decided(witness(), corrupted, witness())
    assert (decision.cause, decision.suspects) == ("transient-fault", [1])


def test_custom_operator_may_race_though_replays_agree() -> None:
    sides = [witness(records=[MINE]) for _ in range(3)]
    sides[1] = witness(original=bad("output"), records=[MINE])
    assert decided(*sides).cause == "unexplained"


# ---- batch-differs


def test_agreed_batches_do_not_differ_if_not_reproduced() -> None:
    """Random samples of workers: `original` agrees on the batch and diverges in the weights of replica 1."""
    drawn = GOOD | {"batch": digest("drawn"), "output": digest("drawn")}
    corrupted = drawn | {"weights": digest("flipped")}
    sides = [witness(original=drawn), witness(original=corrupted), witness(original=drawn)]
    assert decided(*sides).cause != "batch-differs"


def test_agreed_batches_do_not_differ_if_replays_draw_others() -> None:
    again = bad("batch", "output", "weights")
    sides = [witness(second=again), witness(second=again, original=bad("weights")), witness(second=again)]
    assert decided(*sides).cause != "batch-differs"


def test_samples_diverging_in_run_and_replays_are_batch_differs() -> None:
    """Each load gives every replica other samples for the same indices, for example by the loading process."""
    sides = []
    for rank in range(3):
        loaded, again = (GOOD | {"batch": digest(f"{when} {rank}")} for when in ("loaded", "again"))
        sides.append(witness(original=loaded, first=again, second=again, sample_digests=[digest(f"sample {rank}")]))
    assert decided(*sides).cause == "batch-differs"


# ---- nondeterministic-operator, structure-differs


def test_operator_with_different_inputs_is_not_nondeterministic() -> None:
    """An input from outside of the step is unreplayed state; memory that changed in one replay is not."""
    for origin, cause in ((OUTSIDE, "unreplayed-state"), (0, "unexplained")):
        one = replace(RELU, origins=(origin,))
        other = replace(one, inputs=digest("other"), outputs=digest("other"))
        place = first_difference([CONV, one], [CONV, other])
        decision = decided(witness(), witness(second=bad("output"), against_itself=place))
        assert (decision.cause, decision.suspects) == (cause, [1])


def test_operator_with_different_scalars_is_deterministic() -> None:
    other = replace(RELU, scalars="0.3", outputs=digest("other"))
    place = first_difference([CONV, RELU], [CONV, other])
    decision = decided(witness(), witness(second=bad("output"), against_itself=place))
    assert (decision.cause, decision.suspects) == ("unreplayed-state", [1])
    alike = [witness(second=bad("output"), against_itself=place) for _ in range(2)]
    alike[1] = replace(alike[1], original=bad("output"))
    assert decided(*alike).cause == "unexplained", "it varies alike on both, which does not divide them"


def test_nondeterministic_operator_explains_only_its_stages() -> None:
    place = first_difference([CONV, RELU], [CONV, replace(RELU, outputs=digest("again"))])
    racy = witness(second=bad("output"), against_itself=place)
    decision = decided(racy, witness(original=bad("output")), witness())
    assert (decision.cause, decision.suspects) == ("nondeterministic-operator", [0])
    decision = decided(racy, witness(original=bad("weights")), witness())
    assert decision.cause == "unexplained", "a forward pass that raced would show before the weights"


def test_random_path_on_all_replicas_is_not_structure_differs() -> None:
    """Stochastic depth by a private generator: replays differ in structure on all replicas; the step did not."""
    place = first_difference([CONV, RELU, SGD], [CONV, SGD])
    sides = [witness(second=bad("output"), against_itself=place) for _ in range(3)]
    sides[1] = replace(sides[1], original=bad("weights"))
    assert decided(*sides).cause == "unexplained"


def test_evidence_does_not_claim_equal_replays_vary() -> None:
    """An earlier step was not reproduced; both replays of this step agree."""
    decision = decided(witness(), witness(unreproduced=2))
    assert decision.cause == "unexplained"
    assert "replays-vary" not in codes(decision.evidence)
