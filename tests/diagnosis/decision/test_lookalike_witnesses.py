"""The decision tree on witnesses that are nearly those of a cause, and not quite: the other cause, or `unexplained`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dreplica.diagnosis.decision.decide import decide
from dreplica.diagnosis.evidence.observation import Decision, Witness, first_difference
from dreplica.diagnosis.evidence.provenance import Contents
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.environment.manifest import Difference
from tests.diagnosis.decision.test_decide import CONV, GOOD, RELU, SGD, START, always, bad, digest, witness
from tests.messages import codes, data_of

THREADS = {"determinism": {"threads": 2}}
ONEDNN = {"determinism": {"onednn": False}}
MINE = OpRecord("mine.op.default", "", "forward", START, digest("conv"), "")


def rounding(mark: str = "'") -> Witness:
    """A replica whose convolution gives something of its own for the same inputs, each time."""
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


def test_an_override_shared_by_a_class_and_by_one_outside_of_it_explains_nothing() -> None:
    decision = decided(witness(), rounding(), witness(), overrides={1: THREADS, 2: THREADS})
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_an_empty_override_declares_nothing() -> None:
    assert decided(witness(), rounding(), witness(), overrides={1: {}}).cause == "persistent-fault"


def test_a_declared_difference_and_a_transient_fault_at_once_are_unexplained() -> None:
    both = replace(rounding(), original=bad("weights", "output"))
    decision = decided(witness(), both, witness(), overrides={1: THREADS})
    assert (decision.cause, decision.suspects) == ("unexplained", [1])


def test_a_declared_difference_that_changes_nothing_does_not_hide_a_transient_fault() -> None:
    decision = decided(witness(), witness(original=bad("weights")), witness(), overrides={1: THREADS})
    assert (decision.cause, decision.suspects) == ("transient-fault", [1])


def test_two_of_four_with_the_override_divide_as_it_does_three_do_not() -> None:
    pairs = [witness(), witness(), rounding(), rounding()]
    decision = decided(*pairs, overrides={2: THREADS, 3: THREADS})
    assert (decision.cause, decision.suspects) == ("declared-override", [2, 3])
    assert decided(*pairs, overrides={2: THREADS}).cause != "declared-override"
    assert decided(*pairs, overrides={1: THREADS, 2: THREADS, 3: THREADS}).cause != "declared-override"


def test_of_two_declared_differences_the_one_that_changes_nothing_is_no_suspect() -> None:
    decision = decided(witness(), witness(), rounding(), overrides={1: THREADS, 2: ONEDNN})
    assert (decision.cause, decision.suspects) == ("declared-override", [2])


def test_a_number_of_workers_explains_no_operator() -> None:
    """Replays load in the training process, whatever data.num_workers says, and reproduce the difference."""
    decision = decided(witness(), rounding(), witness(), overrides={1: {"data": {"num_workers": 2}}})
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])


def test_a_declared_difference_beside_another_one_is_not_a_fault() -> None:
    decision = decided(witness(), rounding(), rounding("''"), overrides={1: THREADS})
    assert decision.cause == "unexplained"


# ---- environment-differs


def test_other_hardware_that_is_everywhere_or_divides_otherwise_explains_nothing() -> None:
    pairs = [witness(), witness(), rounding(), rounding()]
    assert decided(*pairs, differences=[cards("A", "A", "B", "B")]).cause == "environment-differs"
    assert decided(*pairs, differences=[cards("A", "B", "A", "B")]).cause == "persistent-fault"
    assert decided(*pairs, differences=[cards("A", "A", "A", "B")]).cause == "persistent-fault"
    assert decided(*pairs, differences=[cards("A", "B", "C", "D")]).cause == "environment-differs"


def test_other_hardware_does_not_explain_find_corruption() -> None:
    contents = Contents(frozenset({START}), {"weights": {"weight": digest("flipped")}})
    struck = always(bad("weights"), contents=contents)
    decision = decided(witness(), struck, differences=[cards("A", "B")])
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


def test_without_a_majority_nobody_is_suspected_of_what_an_operator_gave() -> None:
    for count in (1, 2):
        decision = decided(*[witness()] * count, *[rounding()] * count)
        assert (decision.cause, decision.suspects) == ("persistent-fault", [])
        assert decision.sides == (0, count), "left to arbitration"


def test_what_comes_from_nowhere_on_all_replicas_is_code_and_not_memory() -> None:
    """NumPy in the forward pass: no operator has written what the next one reads, on any replica."""
    relus = [replace(RELU, inputs=digest(f"numpy {rank}"), outputs=digest(f"relu {rank}")) for rank in range(3)]
    sides = [
        always(GOOD | {"output": digest(f"output {rank}")}, records=[CONV, relu]) for rank, relu in enumerate(relus)
    ]
    decision = decided(*sides)
    assert (decision.cause, decision.suspects) == ("unexplained", [])


def test_weights_that_no_operator_wrote_on_all_replicas_are_not_memory() -> None:
    sides = []
    for rank in range(3):
        contents = Contents(frozenset({START}), {"weights": {"weight": digest(f"hook {rank}")}})
        sides.append(always(GOOD | {"weights": digest(f"weights {rank}")}, contents=contents))
    assert decided(*sides).cause == "unexplained"


def test_used_indices_that_were_not_sent_are_a_fault_also_between_two() -> None:
    struck = always(bad("indices", "batch"), indices_intact=False, sample_digests=[digest("a"), digest("b")])
    decision = decided(witness(), struck)
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])
    assert "indices-changed" in codes(decision.evidence)


def test_a_batch_changed_after_loading_is_not_other_data() -> None:
    conv = replace(CONV, inputs=digest("struck"), outputs=digest("conv'"))
    struck = always(bad("batch", "output"), records=[conv])
    decision = decided(witness(records=[CONV]), struck, witness(records=[CONV]))
    assert (decision.cause, decision.suspects) == ("persistent-fault", [1])
    assert decision.operator is None, "no operator had written it"


def test_a_custom_operator_with_the_same_settings_is_unexplained_with_a_majority_too() -> None:
    other = replace(MINE, outputs=digest("conv'"))
    sides = [witness(records=[MINE]), always(bad("output"), records=[other]), witness(records=[MINE])]
    decision = decided(*sides)
    assert (decision.cause, decision.suspects) == ("unexplained", [1])


# ---- transient-fault


def test_a_difference_that_is_gone_everywhere_is_nobodys() -> None:
    """What happened is what the replays give, on all: then they cannot have parted."""
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


def test_all_that_moved_the_same_way_are_not_outvoted_by_the_one_that_did_not() -> None:
    moved = [witness(original=bad("weights"))] * 2
    assert decided(*moved, witness()).cause == "unexplained"


def test_random_samples_of_workers_are_not_a_fault_of_memory_fixed_ones_are() -> None:
    original = bad("batch", "output")
    workers = witness(original=original, loaded_by_workers=True, samples_are_random=True)
    assert decided(witness(), workers, witness()).cause == "batch-differs"
    for fixed in ({"samples_are_random": True}, {"loaded_by_workers": True}, {}):
        decision = decided(witness(), witness(original=original, **fixed), witness())
        assert (decision.cause, decision.suspects) == ("transient-fault", [1])


def test_workers_do_not_excuse_weights() -> None:
    struck = witness(original=bad("weights"), loaded_by_workers=True, samples_are_random=True)
    decision = decided(witness(), struck, witness())
    assert (decision.cause, decision.suspects) == ("transient-fault", [1])


def test_a_custom_operator_may_have_raced_though_its_replays_agree() -> None:
    sides = [witness(records=[MINE]) for _ in range(3)]
    sides[1] = witness(original=bad("output"), records=[MINE])
    assert decided(*sides).cause == "unexplained"


# ---- batch-differs


def test_batches_that_agreed_do_not_differ_though_no_replay_reproduces_them() -> None:
    """Random samples of workers: `original` agrees on the batch, and parts at the weights of replica 1."""
    drawn = GOOD | {"batch": digest("drawn"), "output": digest("drawn")}
    struck = drawn | {"weights": digest("flipped")}
    sides = [witness(original=drawn), witness(original=struck), witness(original=drawn)]
    assert decided(*sides).cause != "batch-differs"


def test_batches_that_agreed_do_not_differ_though_each_replay_draws_others() -> None:
    again = bad("batch", "output", "weights")
    sides = [witness(second=again), witness(second=again, original=bad("weights")), witness(second=again)]
    assert decided(*sides).cause != "batch-differs"


def test_samples_that_differ_in_workers_and_in_replays_are_other_data() -> None:
    """By the process that loads, say: each load gives every replica something else, for the same indices."""
    sides = []
    for rank in range(3):
        loaded, again = (GOOD | {"batch": digest(f"{when} {rank}")} for when in ("loaded", "again"))
        sides.append(witness(original=loaded, first=again, second=again, sample_digests=[digest(f"sample {rank}")]))
    assert decided(*sides).cause == "batch-differs"


# ---- nondeterministic-operator, structure-differs


def test_an_operator_that_only_reads_otherwise_is_not_the_nondeterministic_one() -> None:
    other = replace(RELU, inputs=digest("other"), outputs=digest("other"))
    place = first_difference([CONV, RELU], [CONV, other])
    decision = decided(witness(), witness(second=bad("output"), against_itself=place))
    assert (decision.cause, decision.suspects) == ("unexplained", [1])


def test_an_operator_called_with_other_numbers_is_not_nondeterministic() -> None:
    other = replace(RELU, scalars="0.3", outputs=digest("other"))
    place = first_difference([CONV, RELU], [CONV, other])
    decision = decided(witness(), witness(second=bad("output"), against_itself=place))
    assert (decision.cause, decision.suspects) == ("unexplained", [1])


def test_an_operator_that_differs_from_itself_explains_only_the_stages_it_makes() -> None:
    place = first_difference([CONV, RELU], [CONV, replace(RELU, outputs=digest("again"))])
    racy = witness(second=bad("output"), against_itself=place)
    decision = decided(racy, witness(original=bad("output")), witness())
    assert (decision.cause, decision.suspects) == ("nondeterministic-operator", [0])
    decision = decided(racy, witness(original=bad("weights")), witness())
    assert decision.cause == "unexplained", "a forward pass that raced would show before the weights"


def test_a_path_that_every_replica_takes_by_chance_is_no_other_structure() -> None:
    """Stochastic depth by a generator of its own: replays differ in structure, on all; the step itself did not."""
    place = first_difference([CONV, RELU, SGD], [CONV, SGD])
    sides = [witness(second=bad("output"), against_itself=place) for _ in range(3)]
    sides[1] = replace(sides[1], original=bad("weights"))
    assert decided(*sides).cause == "unexplained"


def test_the_evidence_does_not_say_that_replays_differ_which_agree() -> None:
    """An earlier step did not come out as compared; this one was replayed twice alike."""
    decision = decided(witness(), witness(unreproduced=2))
    assert decision.cause == "unexplained"
    assert "replays-vary" not in codes(decision.evidence)
