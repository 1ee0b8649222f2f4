"""The causes that a verdict can name: code, explanation and remedies of each."""

from dataclasses import dataclass

from dreplica.agreement.verdict.remedy import Remedy


@dataclass(frozen=True)
class Cause:
    """A cause that a verdict can name."""

    code: str
    """Stable identifier, which is also the name of the cause's page."""
    explanation: str
    """The cause in one sentence."""
    remedy: tuple[Remedy, ...] = ()
    """The default remedies, for a verdict that has no more specific ones."""


def _cause(code: str, explanation: str, *remedies: str | Remedy) -> Cause:
    return Cause(code, explanation, tuple(Remedy.of(item) if isinstance(item, str) else item for item in remedies))


_NOT_ONCE = (
    "draws",
    "moved counters",
    "operators that wrote in place",
    "another autograd graph",
    "changed modes and attributes",
    "nondeterministic operators",
)
"""Code that runs once, of which a fault of hardware shows no trace."""
_NOT_ALWAYS = (
    "declared settings",
    "environment",
    "hyperparameters",
    "Python values",
    "random draws",
    "order",
    "kernels and dispatch modes",
    "memory layout",
    "uninitialized memory",
)
"""What differs between replicas in every step, none of which divides them as their results do."""
_CHECK_MEMORY = ("check-host-memory", "check-gpu-memory", "test-host-memory")

_ALL = (
    _cause("none", "All replicas are bit for bit the same."),
    _cause(
        "config-differs",
        "Replicas were started with different configs, or a run with another config than its reference.",
        "start-with-one-config",
        "declare-override",
    ),
    _cause(
        "environment-differs",
        "Replicas run on different software, devices, numerics flags or data, or a run differs in these from its "
        "reference.",
        "install-same-versions",
        "use-same-hardware",
        "declare-numerics-override",
    ),
    _cause(
        "optimizer-not-bound",
        "The optimizer does not hold this model's parameters, so nothing is learned.",
        "bind-optimizer",
    ),
    _cause(
        "scheduler-not-bound",
        "The scheduler does not drive the optimizer that steps.",
        "bind-scheduler",
    ),
    _cause(
        "parameters-not-optimized",
        "Trainable parameters are not in the optimizer, or not exactly once.",
        "optimize-parameters",
    ),
    _cause("storage-shared", "Two different tensors of the model share memory.", "unshare-storage"),
    _cause(
        "build-not-seeded",
        "Replicas were built from different random numbers because the build is not seeded.",
        "seed-build",
        "broadcast-build",
    ),
    _cause(
        "build-rng-differs",
        "All builds started from the same seed, but they drew different random numbers, or a different number of them.",
        "build-same-modules",
        "broadcast-state",
    ),
    _cause("indices-differ", "Replicas did not train on the same samples.", "broadcast-indices"),
    _cause(
        "batch-differs",
        "The same sample indices gave different tensors.",
        "compare-data-files",
        "sort-files",
        "seed-augmentation",
    ),
    _cause(
        "nondeterministic-operator",
        "An operator gives different results for the same inputs on the same replica.",
        "strict-mode-or-named",
        "replace-operator",
    ),
    _cause(
        "transient-fault",
        "A few bits of one tensor changed once on a replica, no replay reproduces it, and nothing points to code; code "
        "that ran once and changed just these bits would look the same.",
        Remedy.of("excluded-once", excluded=list(_NOT_ONCE)),
        "rerun-from-agreement",
        "watch-hardware",
        *_CHECK_MEMORY,
    ),
    _cause(
        "persistent-fault",
        "A replica computes or stores a wrong value each time, with the same code and settings as the others.",
        Remedy.of("excluded-always", excluded=list(_NOT_ALWAYS)),
        "retire-hardware",
        "rerun-alone",
        *_CHECK_MEMORY,
    ),
    _cause(
        "declared-override",
        "Replicas diverged because the config gives them different settings.",
        "remove-override",
    ),
    _cause(
        "evaluation-differs",
        "Equal weights and buffers gave different predictions.",
        "evaluate-alike",
    ),
    _cause(
        "not-learning",
        "No trainable weight changes, whether buffers do or not: BatchNorm statistics change in every forward pass in "
        "training mode.",
        "check-learning",
    ),
    _cause(
        "structure-differs",
        "Replicas do not have the same tensors, or do not run the same operators on them.",
        "step-without-hidden-inputs",
    ),
    _cause(
        "order-differs",
        "Replicas hold the same parameters or entries in different orders, so that sums over them may round "
        "differently.",
        "order-parameters-alike",
    ),
    _cause(
        "generators-differ",
        "Random generators were seeded differently, or drawn from differently.",
        "seed-before-build",
        "draw-alike",
    ),
    _cause(
        "hyperparameter-differs",
        "The replicas' optimizers, schedulers or scalers have different settings.",
        "set-hyperparameters-alike",
    ),
    _cause(
        "host-value-differs",
        "An operator was called with different numbers, strings or flags of Python, which no operator made.",
        "make-host-value-equal",
    ),
    _cause(
        "kernel-differs",
        "Another kernel is registered for an operator on some replicas, or something else intercepts it.",
        "register-kernel-alike",
    ),
    _cause(
        "uninitialized-memory",
        "An operator read memory that was allocated without contents and that nothing had written.",
        "write-before-read",
    ),
    _cause(
        "unreplayed-state",
        "The step depends on something that a replay does not restore: code that runs once, a counter, a file, the "
        "clock.",
        "step-without-hidden-inputs",
    ),
    _cause("replica-lost", "A replica ended, failed or stopped responding.", "read-log-of-lost"),
    _cause(
        "unexplained",
        "The evidence is inconclusive: no cause can be named.",
        "compare-every-step",
        "strict-mode-unless-set",
    ),
)

CAUSES = {cause.code: cause for cause in _ALL}
"""Code to cause."""
