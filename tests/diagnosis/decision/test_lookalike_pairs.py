"""Pairs of causes that could be confused: what they have in common, and the one finding that tells them apart."""

from collections.abc import Collection

import pytest

from dreplica.diagnosis.decision.rules import RULES, name_cause
from dreplica.diagnosis.evidence.finding import Kind

K = Kind
ONCE = {K.REPLAYS_AGREE, K.ORIGINAL_DIFFERS}
"""It happened once, on a minority of replicas."""
FLIP = {*ONCE, K.FEW_BITS}
STORED = {K.REPLAYS_REPRODUCE, K.MEMORY_CHANGED, K.FEW_BITS}
"""Memory changes in a few bits, each time."""
COMPUTED = {K.REPLAYS_REPRODUCE, K.OPERATOR_MADE_IT, K.PROVED_WRONG}
"""An operator's result is wrong, each time."""
LASTING = {K.REPLAYS_REPRODUCE}
VARYING = {K.REPLAYS_VARY}
"""Replays of one replica differ."""
MADE = {*LASTING, K.OPERATOR_MADE_IT}

PAIRS: list[tuple[Collection[Kind], str, Collection[Kind], str]] = [
    # A fault that happened once, and code that ran once. The same bits differ.
    (FLIP, "transient-fault", {K.DRAWN_FURTHER}, "generators-differ"),
    *(
        (FLIP, "transient-fault", {trace}, "unreplayed-state")
        for trace in (
            *(K.COUNTER_MOVED, K.WRITTEN_BY_CODE, K.OTHER_GRAPH, K.ATTRIBUTES_MOVED),
            *(K.NOT_STEPPED, K.MANY_TENSORS, K.MANY_BITS),
        )
    ),
    (FLIP, "transient-fault", {K.SAMPLES_DIFFER}, "batch-differs"),
    (FLIP, "transient-fault", {K.HYPERPARAMETER_DIVIDES}, "hyperparameter-differs"),
    (FLIP, "transient-fault", {K.UNWRITTEN_MEMORY}, "uninitialized-memory"),
    # What remains open.
    *(
        (FLIP, "transient-fault", {doubt}, "unexplained")
        for doubt in (K.MAY_RACE, K.FOREIGN_OPERATOR, K.ORIGINAL_GONE, K.SPREAD, K.SEVERAL_RESULTS, K.OUTSIDE_INPUT)
    ),
    # A fault that lasts, and code that differs in every step.
    *(
        (fault, "persistent-fault", {finding}, cause)
        for fault in (STORED, COMPUTED)
        for finding, cause in (
            (K.OVERRIDE_DIVIDES, "declared-override"),
            (K.SAMPLES_DIFFER, "batch-differs"),
            (K.UNWRITTEN_MEMORY, "uninitialized-memory"),
            (K.OTHER_ORDER, "order-differs"),
            (K.HYPERPARAMETER_DIVIDES, "hyperparameter-differs"),
            (K.OTHER_DRAW, "generators-differ"),
            (K.OTHER_HOST_VALUE, "host-value-differs"),
            (K.OTHER_OPERATORS, "structure-differs"),
            (K.MODES_DIVIDE, "structure-differs"),
            (K.OUTSIDE_INPUT, "unexplained"),
            (K.MANY_BITS, "unexplained"),
            (K.DIFFERS_TOO, "unexplained"),
            (K.SEVERAL_RESULTS, "unexplained"),
            (K.EQUALISED, "unexplained"),
        )
    ),
    (COMPUTED, "persistent-fault", {K.KERNELS_DIVIDE}, "kernel-differs"),
    (COMPUTED, "persistent-fault", {K.LAYOUT_DIVIDES}, "structure-differs"),
    (COMPUTED, "persistent-fault", {K.ENVIRONMENT_DIVIDES}, "environment-differs"),
    (COMPUTED, "persistent-fault", {K.OPERATOR_VARIES}, "nondeterministic-operator"),
    (COMPUTED, "persistent-fault", {K.MAY_RACE}, "unexplained"),
    (COMPUTED, "persistent-fault", {K.FOREIGN_OPERATOR}, "unexplained"),
    # An operator that varies.
    ({*VARYING, K.OPERATOR_VARIES}, "nondeterministic-operator", {K.UNWRITTEN_MEMORY}, "uninitialized-memory"),
    ({*VARYING, K.OPERATOR_VARIES}, "nondeterministic-operator", {K.KERNELS_DIVIDE}, "kernel-differs"),
    ({*VARYING, K.INPUT_VARIES}, "unreplayed-state", {K.OPERATOR_VARIES}, "nondeterministic-operator"),
    ({*VARYING, K.INPUT_VARIES}, "unreplayed-state", {K.UNWRITTEN_MEMORY}, "uninitialized-memory"),
    ({*VARYING, K.INPUT_VARIES}, "unreplayed-state", {K.SAMPLES_DIFFER}, "batch-differs"),
    ({*VARYING, K.INPUT_VARIES}, "unreplayed-state", {K.OTHER_HOST_VALUE}, "host-value-differs"),
    ({*VARYING, K.INPUT_VARIES}, "unreplayed-state", {K.OTHER_DRAW}, "generators-differ"),
    # An operator that makes the difference, the same each time.
    ({*MADE, K.ENVIRONMENT_DIVIDES}, "environment-differs", {K.KERNELS_DIVIDE}, "kernel-differs"),
    ({*MADE, K.ENVIRONMENT_DIVIDES}, "environment-differs", {K.LAYOUT_DIVIDES}, "structure-differs"),
    ({*MADE, K.ENVIRONMENT_DIVIDES}, "environment-differs", {K.OVERRIDE_DIVIDES}, "declared-override"),
    ({*MADE, K.ENVIRONMENT_DIVIDES}, "environment-differs", {K.OPERATOR_VARIES}, "nondeterministic-operator"),
    ({*MADE, K.ENVIRONMENT_DIVIDES}, "environment-differs", {K.FOREIGN_OPERATOR}, "unexplained"),
    ({*MADE, K.BOTH_POSSIBLE}, "unexplained", {K.PICKED_BY_TIMING}, "nondeterministic-operator"),
    ({*MADE, K.KERNELS_DIVIDE}, "kernel-differs", {K.OVERRIDE_DIVIDES}, "declared-override"),
    # What the operator was given.
    ({*LASTING, K.OTHER_HOST_VALUE}, "host-value-differs", {K.HYPERPARAMETER_DIVIDES}, "hyperparameter-differs"),
    ({*LASTING, K.OTHER_HOST_VALUE}, "host-value-differs", {K.OVERRIDE_DIVIDES}, "declared-override"),
    ({*LASTING, K.OTHER_HOST_VALUE}, "host-value-differs", {K.OTHER_ORDER}, "order-differs"),
    ({*LASTING, K.OTHER_OPERATORS}, "structure-differs", {K.KERNELS_DIVIDE}, "kernel-differs"),
    ({*LASTING, K.OTHER_OPERATORS}, "structure-differs", {K.OTHER_DRAW}, "generators-differ"),
    ({*LASTING, K.OTHER_OPERATORS}, "structure-differs", {K.OTHER_HOST_VALUE}, "host-value-differs"),
    ({*LASTING, K.OTHER_OPERATORS}, "structure-differs", {K.SEVERAL_RESULTS}, "unexplained"),
    ({*LASTING, K.OTHER_OPERATORS}, "structure-differs", {K.OTHER_ORDER}, "order-differs"),
    ({*LASTING, K.OTHER_DRAW}, "generators-differ", {K.UNWRITTEN_MEMORY}, "uninitialized-memory"),
    ({*LASTING, K.OTHER_DRAW}, "generators-differ", {K.OVERRIDE_DIVIDES}, "declared-override"),
    ({*LASTING, K.OTHER_ORDER}, "order-differs", {K.OPERATOR_VARIES}, "nondeterministic-operator"),
    ({*LASTING, K.OUTSIDE_INPUT}, "unexplained", {K.UNWRITTEN_MEMORY}, "uninitialized-memory"),
    # The build.
    ({K.BUILD_DRAWS_DIFFER}, "build-rng-differs", {K.BUILD_SEEDED_AGAIN}, "build-not-seeded"),
    ({K.BUILD_DRAWS_DIFFER}, "build-rng-differs", {K.BUILD_UNSEEDED}, "build-not-seeded"),
    ({K.BUILD_DRAWS_DIFFER}, "build-rng-differs", {K.BUILD_SEEDS_DECLARED}, "declared-override"),
    ({K.BUILD_DRAWS_DIFFER}, "build-rng-differs", {K.UNWRITTEN_MEMORY}, "uninitialized-memory"),
    ({K.BUILD_UNSEEDED}, "build-not-seeded", {K.UNWRITTEN_MEMORY}, "uninitialized-memory"),
    # The reference.
    ({K.REFERENCE_BATCH}, "batch-differs", {K.REFERENCE_SETTING_SHOWS}, "config-differs"),
    ({K.REFERENCE_BATCH}, "batch-differs", {K.REFERENCE_ENVIRONMENT_ACTS}, "environment-differs"),
    ({K.REFERENCE_SETTING_ACTS}, "config-differs", {K.REFERENCE_ENVIRONMENT_ACTS}, "unexplained"),
    ({K.REFERENCE_ENVIRONMENT_ACTS}, "environment-differs", {K.REFERENCE_SETTING_ACTS}, "unexplained"),
    ({K.REFERENCE_SETTING_ACTS}, "config-differs", ONCE, "unexplained"),
]
"""What is found in both cases, the cause that it names alone, and what is found in addition in the other case."""


@pytest.mark.parametrize(
    ("common", "alone", "more", "together"),
    PAIRS,
    ids=[
        f"{alone}-{together}-{'-'.join(sorted(more))}-{number}"
        for number, (_, alone, more, together) in enumerate(PAIRS)
    ],
)
def test_pair_is_told_apart_by_one_finding(
    common: Collection[Kind], alone: str, more: Collection[Kind], together: str
) -> None:
    assert name_cause(common) == alone
    assert name_cause({*common, *more}) == together


def test_each_cause_of_a_rule_is_in_a_pair() -> None:
    named = {cause for _, alone, _, together in PAIRS for cause in (alone, together)}
    assert {rule.cause for rule in RULES} - named == {"indices-differ", "evaluation-differs"}, (
        "found by their stages alone"
    )
