"""The rules by which findings name a cause: for each cause, the evidence that it needs and what must be excluded.

The rules are read from top to bottom, and the first that holds names the cause. Hardware comes last. Where none holds,
the cause is `unexplained`: a wrong cause is worse than none. Every rule excludes findings that do not explain the stage
in which the replicas had diverged.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from dreplica.diagnosis.evidence.finding import Kind
from dreplica.diagnosis.evidence.observation import Decision


@dataclass(frozen=True)
class Rule:
    """The conditions under which one cause is named. A cause may have several rules: any of them suffices."""

    cause: str
    """The cause, a key of `CAUSES`."""
    needs: frozenset[Kind]
    """Findings that must all be there."""
    any_of: frozenset[Kind] = frozenset()
    """Findings of which at least one must be there; empty if `needs` suffices."""
    excludes: frozenset[Kind] = frozenset()
    """Findings of which none may be there: those of the cause's look-alikes."""

    def holds(self, found: Collection[Kind]) -> bool:
        """Return True if findings of these kinds name the cause."""
        kinds = frozenset(found)
        return self.needs <= kinds and (not self.any_of or bool(self.any_of & kinds)) and not self.excludes & kinds


HARDWARE = ("transient-fault", "persistent-fault")
"""Causes that accuse hardware."""
TRACES_OF_CODE = frozenset(
    {
        Kind.DRAWN_FURTHER,
        Kind.COUNTER_MOVED,
        Kind.WRITTEN_BY_CODE,
        Kind.OTHER_GRAPH,
        Kind.ATTRIBUTES_MOVED,
        Kind.NOT_STEPPED,
        Kind.OUTSIDE_OPTIMIZER,
        Kind.MANY_TENSORS,
        Kind.MANY_BITS,
    }
)
"""Findings that a fault of memory does not leave."""
_LEFT_BY_FAULTS = frozenset(
    {
        Kind.REPLAYS_AGREE,
        Kind.REPLAYS_REPRODUCE,
        Kind.ORIGINAL_DIFFERS,
        Kind.OPERATOR_MADE_IT,
        Kind.MEMORY_CHANGED,
        Kind.FEW_BITS,
        Kind.PROVED_WRONG,
    }
)
NOT_HARDWARE = frozenset(Kind) - _LEFT_BY_FAULTS
"""Findings of which none may be there where hardware is named: each points to code, or leaves the cause open."""


def _rule(cause: str, *needs: Kind, any_of: Collection[Kind] = (), excludes: Collection[Kind] = ()) -> Rule:
    return Rule(cause, frozenset(needs), frozenset(any_of), frozenset({*excludes, Kind.NOT_EXPLAINED}))


_ONE_TIME = Kind.REPLAYS_AGREE
"""What lasts cannot have made a divergence that no replay reproduces."""

RULES = (
    # The build.
    _rule("declared-override", Kind.BUILD_SEEDS_DECLARED, excludes={Kind.BUILD_UNSEEDED}),
    _rule("build-not-seeded", Kind.BUILD_UNSEEDED, excludes={Kind.UNWRITTEN_MEMORY}),
    _rule("build-not-seeded", Kind.BUILD_SEEDED_AGAIN, excludes={Kind.UNWRITTEN_MEMORY}),
    _rule(
        "build-rng-differs",
        Kind.BUILD_DRAWS_DIFFER,
        excludes={Kind.BUILD_UNSEEDED, Kind.BUILD_SEEDED_AGAIN, Kind.BUILD_SEEDS_DECLARED, Kind.UNWRITTEN_MEMORY},
    ),
    # A recorded run as reference.
    _rule("config-differs", Kind.REFERENCE_SETTING_SHOWS),
    _rule("config-differs", Kind.REFERENCE_SETTING_EXPLAINS),
    _rule("environment-differs", Kind.REFERENCE_FLAG_EXPLAINS),
    _rule("config-differs", Kind.REFERENCE_SETTING_ACTS, excludes={Kind.REFERENCE_ENVIRONMENT_ACTS, _ONE_TIME}),
    _rule(
        "environment-differs",
        Kind.REFERENCE_ENVIRONMENT_ACTS,
        excludes={Kind.REFERENCE_SETTING_ACTS, _ONE_TIME},
    ),
    _rule("indices-differ", Kind.REFERENCE_INDICES, excludes={_ONE_TIME}),
    _rule("batch-differs", Kind.REFERENCE_BATCH, excludes={_ONE_TIME}),
    _rule("evaluation-differs", Kind.REFERENCE_PREDICTIONS, excludes={_ONE_TIME}),
    # What was given to the step: settings, samples, memory, order, values, random numbers.
    _rule(
        "declared-override",
        Kind.OVERRIDE_DIVIDES,
        excludes={_ONE_TIME, Kind.REPLAYS_VARY, Kind.SAMPLES_DIFFER},
    ),
    _rule("batch-differs", Kind.SAMPLES_DIFFER, excludes={Kind.UNWRITTEN_MEMORY}),
    _rule("uninitialized-memory", Kind.UNWRITTEN_MEMORY),
    _rule("order-differs", Kind.OTHER_ORDER, excludes={Kind.OPERATOR_VARIES, Kind.REPLAYS_VARY, _ONE_TIME}),
    _rule("hyperparameter-differs", Kind.HYPERPARAMETER_DIVIDES, excludes={Kind.OTHER_DRAW}),
    _rule("generators-differ", Kind.OTHER_DRAW, excludes={_ONE_TIME}),
    _rule("generators-differ", Kind.DRAWN_FURTHER),
    _rule("generators-differ", Kind.GENERATORS_DIVIDE),
    # What the step does with it: kernels, values, operators, layouts, flags.
    _rule(
        "kernel-differs",
        Kind.KERNELS_DIVIDE,
        any_of={Kind.OPERATOR_MADE_IT, Kind.OPERATOR_VARIES, Kind.OTHER_OPERATORS},
        excludes={Kind.UNWRITTEN_MEMORY, _ONE_TIME},
    ),
    _rule("host-value-differs", Kind.OTHER_HOST_VALUE, excludes={_ONE_TIME}),
    _rule(
        "structure-differs",
        Kind.OTHER_OPERATORS,
        excludes={Kind.SEVERAL_RESULTS, Kind.OTHER_HOST_VALUE, Kind.REPLAYS_VARY, _ONE_TIME},
    ),
    _rule("structure-differs", Kind.MODES_DIVIDE, excludes={Kind.REPLAYS_VARY, _ONE_TIME}),
    _rule("structure-differs", Kind.OPERATOR_MADE_IT, Kind.LAYOUT_DIVIDES, excludes={Kind.OPERATOR_VARIES}),
    _rule(
        "environment-differs",
        Kind.OPERATOR_MADE_IT,
        Kind.ENVIRONMENT_DIVIDES,
        excludes={Kind.OPERATOR_VARIES, Kind.FOREIGN_OPERATOR},
    ),
    _rule("nondeterministic-operator", Kind.OPERATOR_VARIES, excludes={Kind.UNWRITTEN_MEMORY, Kind.KERNELS_DIVIDE}),
    _rule("nondeterministic-operator", Kind.OPERATOR_MADE_IT, Kind.BOTH_POSSIBLE, Kind.PICKED_BY_TIMING),
    # Code that ran once, or otherwise than in the replays.
    _rule(
        "unreplayed-state",
        Kind.REPLAYS_AGREE,
        any_of=TRACES_OF_CODE - {Kind.DRAWN_FURTHER},
        excludes={Kind.MAY_RACE, Kind.SAMPLES_DIFFER},
    ),
    _rule(
        "unreplayed-state",
        Kind.REPLAYS_VARY,
        Kind.INPUT_VARIES,
        excludes={Kind.OPERATOR_VARIES, Kind.UNWRITTEN_MEMORY, Kind.SAMPLES_DIFFER},
    ),
    # Hardware: nothing points to code, and the whole difference is known to be what a fault makes.
    _rule("transient-fault", Kind.REPLAYS_AGREE, Kind.ORIGINAL_DIFFERS, Kind.FEW_BITS, excludes=NOT_HARDWARE),
    _rule("persistent-fault", Kind.REPLAYS_REPRODUCE, Kind.MEMORY_CHANGED, Kind.FEW_BITS, excludes=NOT_HARDWARE),
    _rule("persistent-fault", Kind.REPLAYS_REPRODUCE, Kind.OPERATOR_MADE_IT, Kind.PROVED_WRONG, excludes=NOT_HARDWARE),
)
"""The rules, in the order in which they are tried."""


def name_cause(findings: Collection[Kind]) -> str:
    """Return the cause that findings name, `unexplained` if they name none."""
    return next((rule.cause for rule in RULES if rule.holds(findings)), "unexplained")


def name_in(decision: Decision) -> Decision:
    """Return a decision with the cause that its findings name."""
    return replace(decision, cause=name_cause(decision.kinds))


def may_be_hardware(decision: Decision) -> bool:
    """Return True if nothing found so far excludes a fault of hardware."""
    return not NOT_HARDWARE & decision.kinds
