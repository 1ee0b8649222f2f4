"""The catalogue of evidence: every code with the template of its text.

Producers name a code and pass data; `Evidence.of` renders the text last. To add evidence, add its code
here, or to `replay_evidence_texts` if it is of a replayed step.
"""

from collections.abc import Mapping

from dreplica.agreement.verdict.replay_evidence_texts import REPLAY_EVIDENCE

EVIDENCE: Mapping[str, str] = {
    # A line of a report of schema 1.
    "text": "{text}",
    # Every cause.
    "cause": "{explanation}",
    "declared-settings": "replica {replica} declares {settings}",
    "allowed-difference": "differs, and may differ: {difference}",
    "undeclared-difference": "differs: {difference}",
    "later-difference": "differs since training began: {difference}",
    "runs-on": "replica {replica} runs on {device}{shared}",
    # The comparison of replicas.
    "steps-differ": "replicas compare different steps: {some}",
    "entries-differ": "{num_differing} of {num_entries} entries of {stage} differ: {some}",
    "values-differ": "values: {some}",
    "parameters-outside": "parameters of the optimizer that are not the model's: {some}",
    "generators-differ-too": "random number generators that differ after this step, too: {generators}",
    "generators-unseeded": "these generators differed before the first step already: {generators}",
    "generator-drawn-on-some": "{generator} was drawn from on replicas {drawn} and not on replicas {not_drawn}",
    "generators-drawn-apart": (
        "the generator {generator} is {direction} on replica {replicas[1]} than on replica {replicas[0]}, by draws of "
        "32 bits: {draws}"
    ),
    "generators-seeded-apart": (
        "the generator {generator} was seeded differently on replicas {replicas}: its states differ in {bits} bits, "
        "and {most} draws do not lead from one to the other"
    ),
    "tensor-forms-differ": "tensors of different form: {some}",
    "entry-order-differs": (
        "the same {num_entries} entries of {stage} are in different orders: the entry at position {position} is {some}"
    ),
    "group-ranks": "the replicas are numbered in their process group, from 0: it has the job's {some}",
    "shard-differs": "copies along {axes} of {shard} on {ranks} differ",
    "shards-differ-too": "{count} more parts of tensors of this stage differ between their copies: {some}",
    "stage-missing": "some replicas do not have the stage {stage}",
    "differing-stages": "differing stages: {stages}",
    "entries-missing": "{count} entries exist on some replicas only: {some}",
    "no-majority": (
        "no majority among {num_replicas} replicas: the comparison alone cannot identify the replica that is wrong"
    ),
    "fingerprint-algorithm": "replicas {replicas}: {algorithm}",
    "reported-values-differ": (
        "the reported values differ although all compared state agrees: compare every step to find where they diverge"
    ),
    # The comparison with a reference or with the run's own trace.
    "run-resumed": (
        "this run resumed after step {step}: what was not restored (random number generators, optimizer, scheduler, "
        "loss scaler) first shows here"
    ),
    "entry-one-sided": "{entry} exists only {side}",
    "tensor-not-recorded": (
        "the reference has no digests per tensor: record it with --agreement.record tensors to name the tensor"
    ),
    "tensor-not-in-both": "the tensor is unknown, since not both runs recorded it: --agreement.record tensors",
    "steps-before-same": "{steps:,} steps before it are the same, in {digests:,} digests",
    "tensors-damaged": "the tensor is unknown: {problem}",
    "generator-drawn-one-sided": "{generator}'s generator was drawn from only {side}",
    "trace-differs": "the replicas agree with each other, but the trace has another digest of {stage} at step {step}",
    "reference-field-differs": "differs from the reference ({kind}): {field}: {there} there, {here} here",
    "reference-not-replayed": "this step was not replayed: it is unknown whether this run reproduces itself",
    "reference-reproduces": "the replays reproduce this run's own result: this run reproduces itself",
    "reference-settings-explain": "with {settings}, as in the reference, the step reproduces the reference's result",
    "reference-settings-do-not-explain": (
        "with {settings}, as in the reference, the step does not reproduce the reference's result either"
    ),
    "reference-setting-must-show": "a difference in {fields} must show in {stage} at the first step it acts on",
    "reference-data-unseeded": "seed.data is null: each run draws its own sample order",
    "reference-model-unseeded": "seed.model is null: each run draws its own seed",
    "reference-nothing-acts": "no recorded difference between the two runs can act on {stage}",
    "reference-may-act": "differences between the two runs that can act on {stage}: {fields}",
    "reference-assumed-sound": "this assumes that the reference itself is sound",
    "reference-acted-before": "but the earlier compared steps agree, and these differences act on them too",
    "reference-ambiguous": "one side's replays do not show which of these is the cause",
    "reference-neither": "the replays of replicas {replicas} match neither the original step nor the reference",
    "reference-matches-replay": (
        "the replays match the reference: the original result of replicas {replicas} is not reproduced"
    ),
    "reference-on-all-replicas": "the result was the same on all replicas, which a single fault cannot cause",
    # Configs, environments and wiring, before the first step.
    "field-differs": "{difference}",
    "wiring-checked": "found by identity checks on replicas {replicas} before the first step",
    # The build.
    "build-matches-overrides": "replicas differ exactly as their declared settings of the build do",
    "build-seeds-drawn": "seed.model is null: the seeds drawn are {seeds}",
    "build-seeds-differ": "seed.model gives the replicas different seeds: {seeds}",
    "build-seeded-again": (
        "the build seeded torch again on replicas {replicas}: torch.initial_seed() was {before} before the build and "
        "{after} after it"
    ),
    "generators-differ-before-build": "the generators already differed when the build began",
    "generators-differ-after-build": (
        "the generators were equal before the build and differ after it: the builds drew different random numbers, or "
        "a different number of them"
    ),
    "generators-equal-around-build": (
        "the generators were equal before and after the build on all replicas: the difference was not drawn from them"
    ),
    "rebuild-failed": "the replica could not be built again: {error}",
    "rebuild-reproduces": "built again from the same seed, every replica reproduces itself",
    "rebuild-varies": "built again from the same seed, replicas {replicas} do not reproduce themselves",
    "rebuild-operators-agree": (
        "every operator of the build gave the same result: the difference was made outside torch's operators"
    ),
    "rebuild-diverges": "the builds diverge at operator {index}: {one}, {other}",
    # Lost replicas and replicas that do not learn.
    "replica-lost": "replica {replica}: {reason}",
    "loss-noticed": "observed by a surviving replica: {error}",
    "raised-error": "raised on this replica: {error}",
    "parameters-unchanged": "0 of {num_trainable} trainable parameters changed; buffers {buffers}",
    "gradients-missing": "gradients: {num_none} are None, {num_zero} are all zero, of {num_parameters}",
    "learning-rates": "learning rates: {before} at first, {after} after the epoch",
    **REPLAY_EVIDENCE,
}
"""Code to template."""
