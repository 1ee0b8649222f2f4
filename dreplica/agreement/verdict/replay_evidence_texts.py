"""The catalogue of evidence from replays of a step: operators, samples, memory, the original step."""

from collections.abc import Mapping

REPLAY_EVIDENCE: Mapping[str, str] = {
    # Replays of a step.
    "replay-failed": "the step could not be replayed: {error}",
    "restore-failed": "the replicas' state from before the diagnosis could not be restored: {error}",
    "replays-agree": "all replays agree, with each other and across replicas: the divergence is not reproduced",
    "replays-reproduce": "the replays reproduce the divergence on every replica: it is deterministic",
    "replays-and-originals-differ": (
        "replays differ between replicas, and those of replicas {replicas} also differ from the original step"
    ),
    "replays-vary": "two replays from the same state differ from each other on replicas {replicas}",
    "replays-miss-agreed-step": (
        "replicas {replicas} do not reproduce step {step}, at which all had agreed, although two replays agree: the "
        "step depends on more than the replica's state"
    ),
    "earlier-step-not-reproducible": "step {step} is already not reproducible",
    "original-differs": "the original step of replicas {replicas} differs from its replays; on the others it does not",
    "originals-differ-widely": (
        "the original steps of replicas {replicas} differ from the replays: too many for one fault"
    ),
    "original-elements-differ": (
        "replica {replica}: the original step differs from its replay in {stage}: tensors {count} of {total}, elements "
        "{elements}, bits {bits}: {some}"
    ),
    "original-generators-differ": (
        "replica {replica}: the state of generators differs between the original step and its replay, bits {bits}: "
        "{some}"
    ),
    "original-whole-difference": "this is the whole difference of replica {replica}: {proof}",
    "original-activation-flipped": (
        "replica {replica}: a replay in which {places} of the output of {module} is flipped gives all results of the "
        "original step"
    ),
    "original-step-wrote": (
        "replica {replica}: in-place operators wrote more often or less often in the original step than in its replay "
        "to {some}"
    ),
    "original-step-graph": (
        "replica {replica}: the original step made {original} autograd nodes, and its replay {replayed}: other code ran"
    ),
    "original-step-attributes": (
        "replica {replica}: attributes have other values after the original step than after its replay: {some}"
    ),
    "original-step-drew": (
        "replica {replica}: the generator {generator} is {direction} after the original step than after its replay, by "
        "draws of 32 bits: {draws}"
    ),
    "original-step-counted": (
        "replica {replica}: counters have other values after the original step than after its replay: {some}"
    ),
    "original-step-skipped": (
        "replica {replica}: the original step changed none of the {count} weights that its replay changes: the "
        "optimizer did not step"
    ),
    "original-step-overwrote": (
        "replica {replica}: the optimizer alone does not make these weights of the gradients of the original step, "
        "elements {elements}: {some}"
    ),
    "more-than-two-results": "the replicas produced more than two results: no single cause accounts for all of them",
    "later-replay-differs": (
        "later in the step, replica {replica}'s replays also differ from the original, first in {stage}: this is a "
        "separate difference"
    ),
    "later-replicas-differ": "later in the step, replays also differ between replicas, first in {stage}",
    "later-groups-split": (
        "later in the step, in {stage}, the replicas split into more groups, {groups}: this is a separate difference"
    ),
    # Batches and samples.
    "batch-varies": "the batch differs between the two replays: loading the same samples is not reproducible",
    "batch-never-reproduced": (
        "on every replica, the replay loaded another batch than the original step: loading is not reproducible"
    ),
    "samples-random-in-workers": (
        "the samples are drawn at random by the process that loads them, and worker processes loaded them"
    ),
    "samples-differ": "samples of the batch that are different data on different replicas: {count}",
    "first-differing-sample": "first such sample: {sample}",
    "data-split-differs": "the data sets were split differently: {some}",
    "data-names-moved": "the data sets hold the same names in another order: {some}{shown}",
    "data-rows-moved": "the data sets hold the same rows or numbers in another order: {some}{shown}",
    "data-differ": "the data sets hold different data: {some}{shown}",
    "data-few-samples": (
        "{count} of the {size} samples of the batch are the same: the data were changed in places, not made anew"
    ),
    "data-same": "the data sets hold the same data ({count} attributes compared): samples become different when read",
    "data-generators": "the data set has generators: {some}",
    "data-from-files": "the data set reads files: {name}",
    "hashes-differ": "hash() of the same text differs between the replicas: PYTHONHASHSEED is not set to one number",
    "compiled-draws-differ": (
        "torch's generator differs after the step: a compiled model draws random numbers otherwise than an eager one"
    ),
    # Operators.
    "operators-agree": "every operator gave the same result on both sides: the difference was made outside operators",
    "operators-agree-twice": (
        "every operator gave the same result both times: the difference was made outside operators"
    ),
    "operator-unrelated": (
        "operator {index}, {operator}, is the first that differs, but does not affect {stage}, where the replicas "
        "diverged: the difference was made outside operators"
    ),
    "operator-cannot-explain-stage": "but the replicas diverged in {stage}, which this operator does not affect",
    "operator-varies-elsewhere": (
        "operator {index}, {operator}, is the first that differs between them, but the replicas diverged in {stage} "
        "and agreed in every stage that this operator affects"
    ),
    "structure-diverges": "structure diverges at operator {index}: {one} {where_one}, {other} {where_other}",
    "other-calls": "{operator} was called from other lines of code: {one} {where_one}, {other} {where_other}",
    "operator-scalars-differ": (
        "operator {index}, {operator}, was called with different numbers, which no operator produced: ({one}) "
        "{where_one}, ({other}) {where_other}"
    ),
    "operator-inputs-differ": ("operator {index}, {operator}, was given {inputs} that no recorded operator produced"),
    "operator-outputs-differ": (
        "operator {index}, {operator}: inputs agree on replicas {one} and {other}, outputs differ"
    ),
    "operator-varies": ("operator {index}, {operator}: same inputs, different outputs in two runs on the same replica"),
    "operator-varies-on": (
        "on replicas {replicas} that operator gave different outputs for the same inputs in two runs"
    ),
    "operator-documented": "{explanation}",
    "operator-may-race": (
        "not deterministic with these settings, and ran in this step: {operators}. This may have been a race"
    ),
    "operator-may-vary": (
        "{operator} is not deterministic with these settings: this may be the cause although no replica's replay varies"
    ),
    "operator-picked-by-timing": (
        "each process keeps the cuDNN algorithm that it measured as the fastest, and the replicas chose different ones"
    ),
    "operator-foreign": (
        "not an operator of torch, and ran in this step: {operators}. It is unknown whether it is deterministic"
    ),
    "layout-differs": (
        "parameters, buffers or inputs have different memory layouts (strides, memory format), which changes rounding"
    ),
    "settings-match-groups": "replicas differ exactly as their declared settings do",
    "environment-matches-groups": "replicas whose results differ also differ in {difference}",
    "settings-and-environment-equal": "settings and environment are the same on all replicas",
    "settings-and-environment-do-not-match": (
        "neither the environment nor a declared setting that can change this operator's result divides the replicas as "
        "their results do"
    ),
    "host-value": (
        "{operator} was given {one} {where_one}, {other} {where_other}: no operator of the step made these values"
    ),
    "host-values-permuted": (
        "the calls at {source} are given the same values on both sides, in another order, as after iterating over a set"
    ),
    "kernel-differs": "{what}: {places}",
    "draw-differs": "{operator} draws from a generator in another state; all its other inputs are equal",
    "draw-extra": "only {where}: {operator} draws from a generator",
    "first-draws": "first draw of the step {where_one}: {one}; {where_other}: {other}",
    "inputs-permuted": "{operator} was given the same tensors in another order",
    "outside-input": (
        "{operator} read a tensor that is not part of the replica's state and that no operator of the step wrote"
    ),
    "other-tensor-read": "{operator} read another of the tensors that both sides have",
    "unwritten-tensor": (
        "the build allocated {tensor} by {allocator} at {allocated_at}, and wrote nothing to {elements} of its {total} "
        "elements"
    ),
    "unwritten-read": (
        "{operator} read memory that nothing has written: {elements} of {total} elements, allocated by {allocator} at "
        "{allocated_at}; all other elements are equal"
    ),
    # Memory.
    "indices-changed": (
        "replica {replica}: used other indices than it was given; its memory was changed by no operator"
    ),
    "operator-read-changed-memory": (
        "replica {replica}: operator {index} read contents that no operator had written; its memory was changed by no "
        "operator"
    ),
    "memory-changed": (
        "replica {replica}: {names} of {stage} hold contents that no operator wrote; its memory was changed by no "
        "operator"
    ),
    "generator-changed": (
        "replica {replica}: torch's generator was changed by no operator, and differs in {bits} bits"
    ),
    "memory-writer": "the original contents were written by operator {index}, {operator}",
    "elements-differ": "{difference}",
    "original-began-unknown": (
        "replica {replica}: the step before was not compared, so what differed may have begun earlier"
    ),
    "original-spread": (
        "replica {replica}: one wrong value in the middle of the step spreads like this, whether a fault or code that "
        "ran once made it"
    ),
    "original-tensor-gone": (
        "replica {replica}: the original values of {stage} were overwritten by a later step, so it is unknown how many "
        "bits differed: a fault and code that ran once look the same"
    ),
    "other-tensor": "this is a different tensor, not one with flipped bits",
    "memory-overwritten": (
        "{bits} bits of {elements} elements differ, which is not a pattern of bit flips: code other than torch's "
        "operators wrote there"
    ),
    "memory-constant": ("on the intact side all elements are the same number, which may have come from anywhere"),
    "output-rewritten": (
        "most elements differ in most of their bits: code computes such a result, and no defective unit does"
    ),
    # The operator's two results, and the operator in float64.
    "output-differs": "output {output}: {difference}",
    "outputs-equal-when-repeated": "the operator was run once more and gave the same result on both sides",
    "float64-failed": "the operator could not be run in float64: {error}",
    "float64-no-bound": "this operator's rounding error has no known bound: float64 does not show which side is wrong",
    "float64-not-trusted": ("replica {replica} is not trusted: torch's float64 result there differs from NumPy's"),
    "float64-disagrees": "the two sides' float64 runs of the operator do not agree on which side is wrong",
    "float64-within": (
        "in float64 from the same inputs, replica {replica}'s result is within rounding error ({ratio:.3g} of the "
        "bound)"
    ),
    "float64-outside": (
        "in float64 from the same inputs, replica {replica}'s result is outside rounding error ({ratio:.3g} of the "
        "bound)"
    ),
    "float64-equal": (
        "in float64 from the same inputs, replica {replica}'s result is exact, as this operator, which does not round, "
        "requires"
    ),
    "float64-unequal": (
        "in float64 from the same inputs, replica {replica}'s result is not exact, as this operator, which does not "
        "round, requires"
    ),
    "float64-both-possible": "both results are valid roundings, although settings and environment are the same",
    "float64-neither-possible": (
        "neither result is valid, and one fault does not reach both sides: the expected result may be wrong"
    ),
    # `dreplica.diagnose`.
    "state-shared": "replicas did not hold the same state ({place}): all began with replica {replica}'s",
    "objects-differ": "replicas do not train with the same objects: {places}",
    "tensors-differ": "tensors {what} differ in dtype or shape, or exist on some replicas only ({count}): {places}",
    "groups-differ": "parameters are in different groups of the optimizer ({count}): {places}",
    "optimizer-state-missing": (
        "the optimizer has no state on replicas {replicas} where it has on others ({count} tensors, first {tensor}): "
        "they have taken no step, or have lost the state"
    ),
    "order-differs": "replicas hold {where} in different orders ({count} positions differ): {places}",
    "operator-order": (
        "operator {index}, {operator}, was given the same tensors in another order, which changes its result"
    ),
    "modes-differ": "modules are not in the same mode: {places}",
    "step-communicates": ("the step communicates ({operators}): what one replica computes depends on the others"),
    "step-agrees-equalised": (
        "from that state, the step agrees on all replicas, both times: the cause may be in what was made equal, in "
        "code outside of the step function, or in something that happened only once"
    ),
    "step-agrees-own": (
        "with each replica's own generators and settings, the step agrees on all replicas, both times: the cause may "
        "be in code outside of the step function, or in something that happened only once"
    ),
    "state-differed-before": "replicas already differed before this step ({place}): the divergence began earlier",
    "original-not-reproduced": (
        "no replica reproduces its original step: the step function does not do all that the loop does between "
        "keep_state() and step(), or depends on more than the state that was kept"
    ),
    "own-values-differ": "{what}: {some}",
    "equal-values-agree": "with {what} made equal, the step agrees on all replicas",
    "equal-modes-agree": "with {what} made equal, the step agrees on all replicas",
    "equal-values-diverge": "with {what} made equal, the replicas diverge nevertheless",
    "values-equalised": (
        "made equal for the replays: {what}. With their own values, replicas would diverge in {stage}, which had agreed"
    ),
    "first-draw-differs": "first draw that differs: {some}",
    "draws-by-design": (
        "ranks of DistributedDataParallel may draw different numbers in the forward pass: this alone does not explain "
        "different gradients or weights"
    ),
    "vote-only": (
        "only the majority shows which side is wrong, and the tensors of some replicas may have another memory layout"
    ),
    "stage-not-explained": "but the replicas had diverged in {stage}, which this does not explain",
}
"""Code to template."""
