"""Every cause a verdict can name: its code, a sentence of explanation, and the remedy to paste."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """One cause of a verdict."""

    code: str
    explanation: str
    remedy: tuple[str, ...] = ()


_ALL = (
    Cause("none", "All replicas are bit for bit the same."),
    Cause(
        "config-differs",
        "Replicas were started with different configs.",
        (
            "start every replica with the same --config file and the same arguments",
            "declare what is meant to differ:  overrides: {1: {section: {key: value}}}",
        ),
    ),
    Cause(
        "environment-differs",
        "Replicas run on different software, numerics flags or data.",
        (
            "install the same versions on every node:  pip install -r requirements.txt",
            "declare a numerics flag that is meant to differ:  overrides: {1: {determinism: {threads: 2}}}",
        ),
    ),
    Cause(
        "optimizer-not-bound",
        "The optimizer does not hold this model's parameters, so nothing is learned.",
    ),
    Cause("scheduler-not-bound", "The scheduler does not drive the optimizer that steps."),
    Cause("parameters-not-optimized", "Trainable parameters are not in the optimizer, or not exactly once."),
    Cause("storage-shared", "Two different tensors of the model share memory."),
    Cause(
        "build-not-seeded",
        "Replicas were built from different random numbers because the build is not seeded.",
        ("--seed.model 42", "--model.init broadcast  # or: keep unseeded builds and send rank 0's state to all"),
    ),
    Cause(
        "build-rng-differs",
        "All builds started from the same seed, but one drew other or more random numbers than another.",
        (
            "make every replica build the same modules in the same order, without a draw that depends on its rank",
            "--model.init broadcast  # or: send rank 0's state to all",
        ),
    ),
    Cause(
        "indices-differ",
        "Replicas did not train on the same samples.",
        (
            "draw the order once, on rank 0, and broadcast it; or seed the sampler's generator alike on every replica, "
            "anew for each epoch",
        ),
    ),
    Cause(
        "batch-differs",
        "The same samples came out as different tensors.",
        (
            "compare the data files of the replicas' nodes byte by byte",
            "draw augmentation from a generator seeded with (seed, epoch, sample index), not from a worker's or the "
            "global one",
        ),
    ),
    Cause(
        "declared-override",
        "Replicas differ in what the config declares to differ.",
        ("remove the override, or set it for all replicas",),
    ),
    Cause(
        "evaluation-differs",
        "Equal weights and buffers gave different predictions.",
        ("call model.eval() on every replica before evaluating, and evaluate the same samples in the same batches",),
    ),
    Cause(
        "not-learning",
        "The buffers move but no trainable weight does. (BatchNorm statistics move in every training-mode forward, "
        "learning or not.)",
        (
            "check that the learning rate is not 0, that loss.backward() is called, and that the optimizer was made "
            "with model.parameters() of this very model",
        ),
    ),
    Cause(
        "nondeterministic-operator",
        "An operator gives different results for the same inputs on one and the same replica.",
        ("--determinism.mode strict",),
    ),
    Cause(
        "transient-fault",
        "A replica computed or kept something wrong once: replaying the step does not reproduce it.",
        ("run again; if the same replica's host or GPU is named twice, take it out of service",),
    ),
    Cause(
        "persistent-fault",
        "A replica computes or keeps something wrong each time, with the same settings as the others.",
        ("take that replica's host or GPU out of service and test its memory",),
    ),
    Cause("structure-differs", "Replicas do not have the same tensors."),
    Cause(
        "replica-lost",
        "A replica ended, failed or stopped responding.",
        ("read that replica's log above, and its host's (dmesg shows a process killed for want of memory)",),
    ),
    Cause("unexplained", "The evidence does not suffice to name a cause."),
)

CAUSES = {cause.code: cause for cause in _ALL}
