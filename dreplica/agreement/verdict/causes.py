"""Every cause a verdict can name: its code, a sentence of explanation, and what to do about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """One cause of a verdict."""

    code: str
    explanation: str
    """One sentence."""
    remedy: tuple[str, ...] = ()
    """Lines to paste (command-line settings, shell commands) or things to do; a remark follows a `#`."""


_TEST_MEMORY = (
    "edac-util -v  # that host's corrected and uncorrected memory errors; dmesg shows machine checks",
    "nvidia-smi -q -d ECC,ROW_REMAPPER  # that GPU's",
    "sudo memtester 4G 3  # tests the host's memory itself",
)

_ALL = (
    Cause("none", "All replicas are bit for bit the same."),
    Cause(
        "config-differs",
        "Replicas were started with different configs, or a run with another than its reference.",
        (
            "start every replica with the same --config file and the same arguments",
            "--overrides '{1: {optim: {lr: 0.01}}}'  # for what is meant to differ: replica id, section, key, value",
        ),
    ),
    Cause(
        "environment-differs",
        "Replicas run on different software, devices, numerics flags or data, or a run on others than its reference.",
        (
            "install the same versions on every node:  pip install -r requirements.txt",
            "run all replicas on the same model of GPU or CPU",
            "--overrides '{1: {determinism: {threads: 2}}}'  # for a numerics flag that is meant to differ",
        ),
    ),
    Cause(
        "optimizer-not-bound",
        "The optimizer does not hold this model's parameters, so nothing is learned.",
        ("make the optimizer from model.parameters() of this very model, after it is built and moved to its device",),
    ),
    Cause(
        "scheduler-not-bound",
        "The scheduler does not drive the optimizer that steps.",
        ("make the scheduler from the very optimizer that steps",),
    ),
    Cause(
        "parameters-not-optimized",
        "Trainable parameters are not in the optimizer, or not exactly once.",
        ("give the optimizer every parameter that requires a gradient, in one group each",),
    ),
    Cause(
        "storage-shared",
        "Two different tensors of the model share memory.",
        ("clone() one of them; to tie weights, assign one nn.Parameter to both places",),
    ),
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
            "compare the data files of the replicas' nodes byte by byte:  sha256sum FILE",
            "sorted(names)  # files and classes numbered in the order of os.listdir, glob or a set get other numbers",
            "draw augmentation from a generator seeded with (seed, epoch, sample index), not from a worker's or the "
            "global one",
        ),
    ),
    Cause(
        "nondeterministic-operator",
        "An operator gives different results for the same inputs on one and the same replica.",
        (
            "--determinism.mode strict  # or the setting named above, if one is",
            "replace the operator by a deterministic one if strict mode raises on it",
        ),
    ),
    Cause(
        "transient-fault",
        "A replica computed or kept something wrong once, and replaying the step does not reproduce it; code that "
        "reads what replays do not put back (a closure's variables, a file, the clock) would look the same.",
        (
            "run again from the last agreed state: what follows the fault is not to be trusted",
            "watch that replica's host and GPU: if either is named again, take it out of service",
            *_TEST_MEMORY,
        ),
    ),
    Cause(
        "persistent-fault",
        "A replica computes or keeps something wrong each time, with the same settings as the others.",
        (
            "take that replica's host or GPU out of service",
            "dreplica train --replicas 2  # with the same arguments, on it alone: it may even disagree with itself",
            *_TEST_MEMORY,
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
        "No trainable weight moves, whatever the buffers do: BatchNorm statistics move in every forward pass in "
        "training mode, learning or not.",
        (
            "check that the learning rate is not 0, that loss.backward() is called, and that the optimizer was made "
            "with model.parameters() of this very model",
        ),
    ),
    Cause(
        "structure-differs",
        "Replicas do not have the same tensors, or do not run the same operators on them.",
        ("make nothing in the model or the step depend on the rank, the host, the time or an unseeded draw",),
    ),
    Cause(
        "replica-lost",
        "A replica ended, failed or stopped responding.",
        ("read that replica's log above, and its host's (dmesg shows a process killed for want of memory)",),
    ),
    Cause(
        "unexplained",
        "The evidence does not suffice to name a cause.",
        (
            "--agreement.every 1 --agreement.snapshot_every 10  # so that the step can be replayed from close by",
            "--determinism.mode strict  # unless it already is: it takes away one kind of cause",
        ),
    ),
)

CAUSES = {cause.code: cause for cause in _ALL}
