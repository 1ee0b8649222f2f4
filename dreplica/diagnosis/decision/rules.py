"""The rules by which findings name a cause: for each cause, the evidence that it needs and what must be excluded.

The rules are read from top to bottom, and the first that holds names the cause. Hardware comes last. Where none holds,
the cause is `unexplained`: a wrong cause is worse than none.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from dreplica.diagnosis.evidence.finding import Kind
from dreplica.diagnosis.evidence.observation import Decision


@dataclass(frozen=True)
class Rule:
    """The conditions under which one cause is named."""

    cause: str
    """The cause, a key of `CAUSES`."""
    needs: frozenset[Kind]
    """Findings that must all be there."""
    excludes: frozenset[Kind] = frozenset()
    """Findings of which none may be there: those of the cause's look-alikes."""


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
        Kind.MANY_TENSORS,
        Kind.MANY_BITS,
    }
)
"""Findings that a fault of memory does not leave."""
_DIVIDING = frozenset(
    {
        Kind.OVERRIDE_DIVIDES,
        Kind.ENVIRONMENT_DIVIDES,
        Kind.HYPERPARAMETER_DIVIDES,
        Kind.KERNELS_DIVIDE,
        Kind.LAYOUT_DIVIDES,
        Kind.MODES_DIVIDE,
    }
)
_PLACES_OF_CODE = frozenset(
    {
        Kind.OTHER_OPERATORS,
        Kind.OTHER_HOST_VALUE,
        Kind.OTHER_DRAW,
        Kind.OTHER_ORDER,
        Kind.UNWRITTEN_MEMORY,
        Kind.OUTSIDE_INPUT,
        Kind.SAMPLES_DIFFER,
    }
)
_OPEN = frozenset({Kind.MAY_RACE, Kind.FOREIGN_OPERATOR, Kind.EQUALISED, Kind.SEVERAL_RESULTS})
NOT_HARDWARE = (
    TRACES_OF_CODE | _DIVIDING | _PLACES_OF_CODE | _OPEN | {Kind.ORIGINALS_DIFFER_WIDELY, Kind.OPERATOR_VARIES}
)
"""Findings of which none may be there where hardware is named."""

RULES = (
    Rule("declared-override", frozenset({Kind.OVERRIDE_DIVIDES}), frozenset({Kind.ORIGINAL_DIFFERS})),
    Rule("batch-differs", frozenset({Kind.SAMPLES_DIFFER})),
    Rule("order-differs", frozenset({Kind.OTHER_ORDER}), frozenset({Kind.OPERATOR_VARIES})),
    Rule("hyperparameter-differs", frozenset({Kind.HYPERPARAMETER_DIVIDES})),
    Rule("generators-differ", frozenset({Kind.OTHER_DRAW})),
    Rule("generators-differ", frozenset({Kind.DRAWN_FURTHER})),
    Rule("host-value-differs", frozenset({Kind.OTHER_HOST_VALUE}), frozenset({Kind.EQUALISED})),
    Rule("uninitialized-memory", frozenset({Kind.UNWRITTEN_MEMORY})),
    Rule("structure-differs", frozenset({Kind.OTHER_OPERATORS}), frozenset({Kind.SEVERAL_RESULTS})),
    Rule("structure-differs", frozenset({Kind.MODES_DIVIDE})),
    Rule("structure-differs", frozenset({Kind.LAYOUT_DIVIDES})),
    Rule("kernel-differs", frozenset({Kind.OPERATOR_MADE_IT, Kind.KERNELS_DIVIDE})),
    Rule("environment-differs", frozenset({Kind.OPERATOR_MADE_IT, Kind.ENVIRONMENT_DIVIDES})),
    Rule("nondeterministic-operator", frozenset({Kind.OPERATOR_VARIES}), frozenset({Kind.UNWRITTEN_MEMORY})),
    *(
        Rule("unreplayed-state", frozenset({Kind.REPLAYS_AGREE, Kind.ORIGINAL_DIFFERS, trace}))
        for trace in sorted(TRACES_OF_CODE)
    ),
    Rule("transient-fault", frozenset({Kind.REPLAYS_AGREE, Kind.ORIGINAL_DIFFERS, Kind.FEW_BITS}), NOT_HARDWARE),
    Rule("persistent-fault", frozenset({Kind.REPLAYS_REPRODUCE, Kind.MEMORY_CHANGED, Kind.FEW_BITS}), NOT_HARDWARE),
    Rule(
        "persistent-fault", frozenset({Kind.REPLAYS_REPRODUCE, Kind.OPERATOR_MADE_IT, Kind.PROVED_WRONG}), NOT_HARDWARE
    ),
)
"""The rules, in the order in which they are tried."""


def name_cause(findings: Collection[Kind]) -> str:
    """Return the cause that findings name, `unexplained` if they name none."""
    found = frozenset(findings)
    return next((rule.cause for rule in RULES if rule.needs <= found and not rule.excludes & found), "unexplained")


def name_in(decision: Decision) -> Decision:
    """Return a decision with the cause that its findings name."""
    cause = name_cause(decision.kinds)
    if cause == "unexplained" and not (decision.cause in HARDWARE and NOT_HARDWARE & decision.kinds):
        return decision
    return replace(decision, cause=cause)
