"""Findings: single observations on a divergence, from which the rules name its cause."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dreplica.agreement.verdict.evidence import Evidence


class Kind(StrEnum):
    """What was observed. The comment of each kind says what must hold for it to be reported."""

    # The original step, its two replays, and the replicas.
    REPLAYS_AGREE = "replays-agree"
    """All replays give one result, within each replica and across replicas."""
    REPLAYS_REPRODUCE = "replays-reproduce"
    """Each replica's replays give its own original result, which differs between replicas."""
    ORIGINAL_DIFFERS = "original-differs"
    """The original step of a minority of replicas differs from its replays."""
    ORIGINALS_DIFFER_WIDELY = "originals-differ-widely"
    """The original step of half of the replicas or more differs from its replays."""
    # The place: the first operator that differs, of those that can have made the difference.
    OPERATOR_VARIES = "operator-varies"
    """The operator gives different results for the same inputs on one replica."""
    OPERATOR_MADE_IT = "operator-made-it"
    """The same call on the same inputs gives different results on different replicas, each time."""
    OTHER_OPERATORS = "other-operators"
    """Replicas run different operators."""
    OTHER_HOST_VALUE = "other-host-value"
    """The operator was called with different numbers, strings or flags of Python, which no operator made."""
    OTHER_DRAW = "other-draw"
    """The operator draws from a generator whose state differs, and all its other inputs are equal."""
    OTHER_ORDER = "other-order"
    """The operator was given the same tensors in another order."""
    UNWRITTEN_MEMORY = "unwritten-memory"
    """The operator read memory that was allocated without contents and that nothing has written."""
    OUTSIDE_INPUT = "outside-input"
    """The operator read a tensor that no operator of the step wrote and that is not part of the replica's state."""
    MEMORY_CHANGED = "memory-changed"
    """A tensor's contents changed between the operator that wrote it and the one that read it."""
    SAMPLES_DIFFER = "samples-differ"
    """The same indices give different samples: loaded alone, loaded again, or drawn in workers."""
    # What differs between replicas and divides them exactly as their results do.
    OVERRIDE_DIVIDES = "override-divides"
    """The config declares different settings, which can act on the place."""
    ENVIRONMENT_DIVIDES = "environment-divides"
    """A numerics flag or another field of the manifest that can change a rounding."""
    HYPERPARAMETER_DIVIDES = "hyperparameter-divides"
    """A setting of the optimizer, the scheduler or the scaler."""
    KERNELS_DIVIDE = "kernels-divide"
    """Kernels registered for the operator at the place, dispatch modes in effect, or patched functions of torch."""
    LAYOUT_DIVIDES = "layout-divides"
    """Strides of parameters, buffers or inputs."""
    MODES_DIVIDE = "modes-divide"
    """Training or evaluation mode of modules, or their plain attributes."""
    # Traces that code leaves and a fault of memory does not.
    DRAWN_FURTHER = "drawn-further"
    """A bounded number of draws leads from one state of a generator to the other."""
    COUNTER_MOVED = "counter-moved"
    """An integer buffer differs by more than a few bits, or by a small number of counts."""
    WRITTEN_BY_CODE = "written-by-code"
    """A tensor's version counter moved further than in the replay: an in-place operator wrote to it."""
    OTHER_GRAPH = "other-graph"
    """The step made another number of autograd nodes than its replay."""
    ATTRIBUTES_MOVED = "attributes-moved"
    """A mode or a plain attribute of a module, or an attribute of an optimizer, differs from the replay's."""
    NOT_STEPPED = "not-stepped"
    """The weights are those of before the step: the optimizer did not step."""
    MANY_TENSORS = "many-tensors"
    """More than two tensors of a stage differ that no forward or backward pass spreads a difference over."""
    MANY_BITS = "many-bits"
    """More bits differ than a fault of memory flips."""
    # Traces that a fault of memory leaves, and only the simplest code does.
    FEW_BITS = "few-bits"
    """The difference is a few bits of one tensor, and these are known to be all of it."""
    PROVED_WRONG = "proved-wrong"
    """The operator's result is outside of the error bound that float64 gives, or most replicas have another one."""
    # What leaves the cause open.
    MAY_RACE = "may-race"
    """An operator ran that may vary, without varying in the replays."""
    FOREIGN_OPERATOR = "foreign-operator"
    """An operator ran that is not PyTorch's."""
    EQUALISED = "equalised"
    """Something that differed was made equal for the replay, and may have been the cause."""
    SEVERAL_RESULTS = "several-results"
    """More than two different results: more than one fault, or none."""


@dataclass(frozen=True)
class Finding:
    """One observation, with the evidence for it."""

    kind: Kind
    """What was observed."""
    lines: Sequence[Evidence] = ()
    """The evidence, for the verdict."""
    replicas: Sequence[int] = ()
    """The replicas that it singles out; empty if none."""
