"""The table of planted mistakes, each with the cause that an expert would conclude.

The rule: the expectation is what a perfect expert would conclude from the evidence that can exist in the setting (the
state of all replicas, repeated steps, and what a library can observe cheaply), not what the program is known to find.
It was written before the finished diagnosis had run on it. It is not changed after a run without a line in `CHANGED`
that says why.

- A cause in `also` is just as true a statement about the mistake, and counts as right; `why` says why.
- Where the expectation is `unexplained`, no cause of the list is true, and place and line must be in the verdict.
- In DDP the place must be right, and the cause either this one, `unexplained`, or one in `also`.
- `may_agree`: the mistake may leave no difference in any bit, which depends on the CPU or on what is in the heap, at
  the first step or at all.
- `is_small`: at most 8 bits of one tensor, once. Nothing tells these from a fault of memory, so they are counted apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.benchmarks.mistakes import plants_data as data
from tests.benchmarks.mistakes import plants_ddp as ddp
from tests.benchmarks.mistakes import plants_once as once
from tests.benchmarks.mistakes import plants_random as rand
from tests.benchmarks.mistakes import plants_settings as setting
from tests.benchmarks.mistakes import plants_values as value

CHANGED: Mapping[str, str] = {
    "checkpoint_without_rng": "stage: the recomputation also moves the statistics of BatchNorm, which was overlooked",
    "threads_and_long_sum": "stages: the sum of the forward pass may round alike where that of the backward pass, or a "
    "convolution of a later step, does not, so `gradients` and `buffers` were added",
    "evaluation_mode_for_a_step_once": "also: dropout draws nothing in that step, so the generator is behind as well",
    "fused_on_one": "may_agree: `foreach` chooses an implementation of the same numbers, so it need not be compared",
    "noise_of_own_generator": "also: no replay restores a generator in a variable of the script, which was overlooked",
    "gradient_noise_by_rank": "also: as noise_of_own_generator",
    "stochastic_rounding": "also: as noise_of_own_generator",
    "array_of_numpy_generator": "also: an array of NumPy is a value of the host, which the list of causes leaves open",
    "dropout_from_own_mask": "also: as array_of_numpy_generator",
    "seed_in_step_by_rank": "also: no replay restores the variable that counts the steps, which was overlooked",
    "kernel_of_log_softmax": "tensor: the loop returns the loss first, so its name there is `returned.0`",
    "written_through_numpy": "also: the view that NumPy writes through is made by an operator that one replica runs",
    "norm_over_set": "step: a norm may round alike at the first step, so any later step is right where `may_agree`",
}
"""Name of a kind to the reason why its expectation was changed after a run."""

When = Literal["acted", "first", "at", "after", "evaluation", "before-training"]


@dataclass(frozen=True)
class Kind:
    """One kind of mistake."""

    plant: Callable[..., Any]
    """The function that makes the mistake. Its docstring says what the mistake is."""
    point: str
    """The point of training at which it is made: see `Site.reach`."""
    cause: str
    """The expected cause, `none` if replicas agree and nothing is to be named."""
    stages: tuple[str, ...]
    """Stages of which one must be the first that differs."""
    settings: str = "LT"
    """Where it is planted: L a custom loop, T the trainer, D DistributedDataParallel."""
    why: str = ""
    """Why this is the honest expectation, where it is not plain."""
    also: tuple[str, ...] = ()
    """Other causes that are as true."""
    is_once: bool = False
    """True if the code runs once; otherwise in each step."""
    when: When = "acted"
    """The step that must be named: `acted`, at which the mistake was first made; the first; `at`; the one after; that
    of the first evaluation; `before-training`, none."""
    tensor: str | None = None
    """The tensor or entry that must be named, where it is determined."""
    may_agree: bool = False
    is_small: bool = False
    network: str | None = None
    """The only network that it can be planted in."""
    at: int | None = None
    """The step at which it is made, drawn if None."""
    is_always: bool = False
    """True if the function is called from the first step on, and decides when to act."""
    helpers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions at other points that are needed and are no mistakes."""

    @property
    def name(self) -> str:
        """Name of the kind."""
        return self.plant.__name__ + ("_once" if self.is_once and not self.plant.__name__.endswith("_once") else "")


_FORWARD = ("output",)
_INPUT = ("buffers", "output")
_RNG = ("rng",)
_GRADIENTS = ("gradients",)
_OPTIMIZER = ("optimizer",)
_WEIGHTS = ("weights",)
_EXTRA_DRAW = "the draw is an operator that only one replica runs, and also what moves its generator"
_RERUN = "the code runs once, so a replay does not repeat it; that it also drew or set something is as true"
_VARIES = "the value differs between replicas and also from replay to replay"
_CLOSURE = "the generator, or its seed, also is in a variable of the script, which no replay restores"
_SKEWED = "the operator runs on one replica only, in a mode or a patch: both are true"
_DRAWS = ("generators-differ",)

KINDS: tuple[Kind, ...] = (
    # ---- Random numbers
    Kind(rand.seed_by_rank, "built", "generators-differ", _RNG, "L"),
    Kind(
        rand.seed_by_rank,
        "built",
        "build-not-seeded",
        _RNG,
        "T",
        "the build seeds the generators again, which only the trainer can see",
        also=_DRAWS,
    ),
    Kind(rand.seed_by_rank, "built", "none", (), "D", "each rank may draw its own numbers there"),
    Kind(rand.seed_by_pid, "before", "generators-differ", _FORWARD),
    Kind(rand.seed_in_step_by_rank, "before", "generators-differ", _FORWARD, why=_CLOSURE, also=("unreplayed-state",)),
    Kind(rand.seed_by_clock, "before", "generators-differ", _FORWARD, why=_VARIES, also=("unreplayed-state",)),
    Kind(
        rand.seed_once,
        "before",
        "unreplayed-state",
        _FORWARD,
        why="no number of draws leads from one seed to another, but generators that differ are as true",
        also=_DRAWS,
        is_once=True,
    ),
    Kind(rand.draw_torch, "gradients", "generators-differ", _RNG, is_once=True, why=_RERUN, also=("unreplayed-state",)),
    Kind(rand.draw_torch, "before", "generators-differ", _FORWARD, why=_EXTRA_DRAW, also=("structure-differs",)),
    Kind(rand.draw_numpy, "before", "generators-differ", _RNG, is_once=True, why=_RERUN, also=("unreplayed-state",)),
    Kind(rand.draw_numpy, "stepped", "generators-differ", _RNG),
    Kind(rand.draw_python, "before", "generators-differ", _RNG, is_once=True, why=_RERUN, also=("unreplayed-state",)),
    Kind(rand.draw_python, "gradients", "generators-differ", _RNG),
    Kind(
        rand.draw_permutation,
        "stepped",
        "generators-differ",
        _RNG,
        is_once=True,
        why=_RERUN,
        also=("unreplayed-state",),
    ),
    Kind(rand.draw_in_hidden, "hidden", "generators-differ", _FORWARD, why=_EXTRA_DRAW, also=("structure-differs",)),
    Kind(
        rand.noise_of_own_generator, "hidden", "generators-differ", _FORWARD, why=_CLOSURE, also=("unreplayed-state",)
    ),
    Kind(
        rand.noise_of_unseeded_generator,
        "hidden",
        "generators-differ",
        _FORWARD,
        why=_VARIES,
        also=("unreplayed-state",),
    ),
    Kind(rand.noise_of_forked_generator, "hidden", "generators-differ", _FORWARD),
    Kind(
        rand.noise_of_numpy_generator, "hidden", "host-value-differs", _FORWARD, why=_VARIES, also=("unreplayed-state",)
    ),
    Kind(
        rand.noise_of_python_generator,
        "hidden",
        "host-value-differs",
        _FORWARD,
        why=_VARIES,
        also=("unreplayed-state",),
    ),
    Kind(
        rand.array_of_numpy_generator,
        "hidden",
        "unreplayed-state",
        _FORWARD,
        why="the array comes from outside of the step, and is another one in each replay; its generator is not seen",
        also=("generators-differ", "host-value-differs"),
    ),
    Kind(
        rand.dropout_from_own_mask,
        "hidden",
        "unreplayed-state",
        _FORWARD,
        why="the mask comes from outside of the step, and is another one in each replay; its generator is not seen",
        also=("generators-differ", "host-value-differs"),
    ),
    Kind(
        rand.gradient_noise_on_one,
        "gradients",
        "generators-differ",
        _GRADIENTS,
        "LTD",
        _EXTRA_DRAW,
        also=("structure-differs",),
    ),
    Kind(
        rand.gradient_noise_on_one,
        "gradients",
        "generators-differ",
        _GRADIENTS,
        "LTD",
        _RERUN,
        also=("unreplayed-state",),
        is_once=True,
    ),
    Kind(
        rand.gradient_noise_by_rank,
        "gradients",
        "generators-differ",
        _GRADIENTS,
        "LTD",
        why=_CLOSURE,
        also=("unreplayed-state",),
    ),
    Kind(
        rand.reinitialise_head,
        "before",
        "generators-differ",
        _FORWARD,
        why=_RERUN,
        also=("unreplayed-state",),
        is_once=True,
    ),
    Kind(rand.reinitialise_head, "before", "unreplayed-state", _WEIGHTS, "D", _RERUN, also=_DRAWS, is_once=True),
    Kind(
        rand.stochastic_rounding,
        "stepped",
        "generators-differ",
        _WEIGHTS,
        "LTD",
        why=_CLOSURE,
        also=("unreplayed-state",),
    ),
    Kind(
        rand.checkpoint_without_rng,
        "built",
        "generators-differ",
        ("buffers",),
        why="the backward pass of one replica runs more operators, which is why its masks are drawn from another state",
        also=("structure-differs",),
        when="first",
    ),
    # ---- Settings
    Kind(setting.lr_by_rank, "built", "hyperparameter-differs", _OPTIMIZER, "LTD", when="first", tensor="group0.lr"),
    Kind(
        setting.lr_once,
        "gradients",
        "hyperparameter-differs",
        _OPTIMIZER,
        "LTD",
        _RERUN,
        is_once=True,
        also=("unreplayed-state",),
        tensor="group0.lr",
    ),
    Kind(
        setting.decay_from_environment,
        "built",
        "hyperparameter-differs",
        _OPTIMIZER,
        "LTD",
        when="first",
        tensor="group0.weight_decay",
    ),
    Kind(setting.momentum_by_rank, "built", "hyperparameter-differs", _OPTIMIZER, "LTD", when="first"),
    Kind(setting.nesterov_on_one, "built", "hyperparameter-differs", _OPTIMIZER, when="first"),
    Kind(setting.betas_by_rank, "built", "hyperparameter-differs", _OPTIMIZER, when="first"),
    Kind(setting.epsilon_by_rank, "built", "hyperparameter-differs", _OPTIMIZER, "LTD", when="first"),
    Kind(setting.fused_on_one, "built", "hyperparameter-differs", _OPTIMIZER, when="first", may_agree=True),
    Kind(setting.gamma_by_rank, "built", "hyperparameter-differs", _OPTIMIZER, "LTD", when="first"),
    Kind(
        setting.scheduler_twice,
        "stepped",
        "hyperparameter-differs",
        _OPTIMIZER,
        "LTD",
        _RERUN,
        is_once=True,
        also=("unreplayed-state",),
    ),
    Kind(setting.scheduler_twice, "stepped", "hyperparameter-differs", _OPTIMIZER),
    Kind(setting.use_plateau, "built", "hyperparameter-differs", _OPTIMIZER, "LD", when="first"),
    Kind(setting.scaler_by_rank, "built", "hyperparameter-differs", _OPTIMIZER, "L", when="first"),
    Kind(
        setting.scaler_by_rank,
        "built",
        "hyperparameter-differs",
        ("gradients", "optimizer"),
        "D",
        when="first",
        why="gradients of differently scaled losses are averaged, and divided by each rank's own scale",
    ),
    Kind(setting.clip_by_rank, "gradients", "host-value-differs", _GRADIENTS, "LTD"),
    Kind(setting.clip_value_by_rank, "gradients", "host-value-differs", _GRADIENTS, "LTD"),
    Kind(setting.clip_on_one, "gradients", "structure-differs", _GRADIENTS, "LTD"),
    Kind(setting.clip_on_one, "gradients", "unreplayed-state", _GRADIENTS, "LTD", is_once=True),
    Kind(setting.dropout_by_rank, "built", "host-value-differs", _FORWARD, when="first"),
    Kind(setting.momentum_of_norm_by_rank, "built", "host-value-differs", ("buffers",), when="first"),
    Kind(setting.smoothing_by_rank, "built", "host-value-differs", _FORWARD, when="first"),
    Kind(setting.smoothing_on_one, "built", "structure-differs", _FORWARD, when="first"),
    Kind(
        setting.class_weights_by_rank,
        "built",
        "unexplained",
        _FORWARD,
        when="first",
        why="a tensor that is neither state nor made in the step differs, which no cause of the list says",
    ),
    Kind(
        setting.left_in_evaluation,
        "before",
        "structure-differs",
        ("buffers",),
        why="modules are in another mode, which also calls an operator with another flag",
        also=("host-value-differs",),
    ),
    Kind(
        setting.norm_in_evaluation,
        "built",
        "structure-differs",
        ("buffers",),
        when="first",
        why="a module is in another mode, which also calls an operator with another flag",
        also=("host-value-differs",),
    ),
    Kind(setting.frozen_head, "built", "structure-differs", _GRADIENTS, when="first"),
    Kind(setting.frozen_bias, "built", "structure-differs", _GRADIENTS, when="first"),
    Kind(setting.head_in_bfloat16, "built", "structure-differs", _WEIGHTS, tensor="head.weight"),
    Kind(setting.autocast_on_one, "hidden", "structure-differs", _FORWARD),
    Kind(
        setting.channels_last_on_one, "built", "structure-differs", _INPUT, when="first", network="cnn", may_agree=True
    ),
    Kind(setting.threads_on_one, "built", "environment-differs", (), "T", when="before-training"),
    Kind(
        setting.threads_and_long_sum,
        "hidden",
        "environment-differs",
        ("buffers", "output", "gradients"),
        may_agree=True,
    ),
    Kind(setting.flush_denormals_on_one, "hidden", "environment-differs", ("output", "gradients"), may_agree=True),
    Kind(setting.flag_at_build, "built", "environment-differs", (), "T", when="before-training"),
    Kind(setting.flag_in_step, "before", "none", (), "LTD", "no operator depends on the flag"),
    # ---- Python values
    Kind(value.scale_by_rank, "inputs", "host-value-differs", _INPUT),
    Kind(value.scale_by_environment, "hidden", "host-value-differs", _FORWARD),
    Kind(value.scale_by_clock, "hidden", "host-value-differs", _FORWARD, why=_VARIES, also=("unreplayed-state",)),
    Kind(value.scale_by_pid, "hidden", "host-value-differs", _FORWARD),
    Kind(value.scale_by_hash, "hidden", "host-value-differs", _FORWARD),
    Kind(value.scale_by_file, "hidden", "host-value-differs", _FORWARD),
    Kind(
        value.scale_by_counting_file, "hidden", "host-value-differs", _FORWARD, why=_VARIES, also=("unreplayed-state",)
    ),
    Kind(value.loss_scaled, "loss", "host-value-differs", _FORWARD),
    Kind(value.loss_scaled, "loss", "none", (), "D", "the gradients are averaged, so all ranks get the same"),
    Kind(value.loss_scaled_on_one, "loss", "structure-differs", _FORWARD),
    Kind(
        value.decay_of_average,
        "stepped",
        "host-value-differs",
        ("buffers",),
        helpers={"built": data.average_buffer},
        tensor="head.average",
    ),
    Kind(value.clamp_by_rank, "hidden", "host-value-differs", _FORWARD),
    Kind(value.branch_on_rank, "hidden", "structure-differs", _FORWARD),
    Kind(value.top_by_rank, "hidden", "host-value-differs", _FORWARD),
    Kind(value.mode_by_rank, "inputs", "structure-differs", _INPUT),
    Kind(
        value.closure_tensor,
        "hidden",
        "unexplained",
        _FORWARD,
        why="a tensor that is neither state nor made in the step differs, which no cause of the list says",
    ),
    # ---- Memory
    Kind(value.scratch_never_written, "hidden", "uninitialized-memory", _FORWARD, may_agree=True),
    Kind(value.empty_like_accumulator, "hidden", "uninitialized-memory", _FORWARD, may_agree=True),
    Kind(
        value.parameter_never_written,
        "built",
        "uninitialized-memory",
        _WEIGHTS,
        "T",
        may_agree=True,
        tensor="head.gain",
    ),
    Kind(
        value.written_through_numpy,
        "hidden",
        "unexplained",
        _FORWARD,
        also=("structure-differs",),
        why="memory changes between two operators, in more bits than a fault changes: no cause of the list says this",
    ),
    Kind(value.weights_through_numpy, "gradients", "unreplayed-state", _WEIGHTS, "LTD", is_once=True),
    # ---- Order
    Kind(
        value.sum_in_set_order,
        "hidden",
        "host-value-differs",
        _FORWARD,
        why="the factors are numbers of Python, and come in another order",
        also=("order-differs",),
    ),
    Kind(value.sum_tensors_in_order, "hidden", "order-differs", _FORWARD, may_agree=True),
    Kind(value.concatenate_in_order, "hidden", "order-differs", _FORWARD),
    Kind(value.norm_over_set, "gradients", "order-differs", _GRADIENTS, "LTD", may_agree=True),
    Kind(value.parameters_in_set_order, "built", "order-differs", _OPTIMIZER, "LTD", when="first"),
    Kind(
        value.groups_in_other_order,
        "built",
        "order-differs",
        _OPTIMIZER,
        when="first",
        why="the settings of the first group differ, because it is the other's second",
        also=("hyperparameter-differs",),
    ),
    Kind(value.modules_in_other_order, "built", "order-differs", _WEIGHTS),
    # ---- Kernels
    Kind(value.kernel_of_addmm, "built", "kernel-differs", _INPUT, when="first"),
    Kind(value.kernel_of_relu, "built", "kernel-differs", _INPUT, when="first"),
    Kind(value.kernel_of_threshold_backward, "built", "kernel-differs", _GRADIENTS, when="first"),
    Kind(value.kernel_of_log_softmax, "built", "kernel-differs", _FORWARD, when="first"),
    Kind(
        value.kernel_of_relu,
        "stepped",
        "kernel-differs",
        _INPUT,
        when="after",
        is_once=True,
        why="registered late, and from then on in effect",
    ),
    Kind(value.patched_relu, "built", "structure-differs", _INPUT, when="first", why=_SKEWED, also=("kernel-differs",)),
    Kind(
        value.patched_linear, "built", "structure-differs", _INPUT, when="first", why=_SKEWED, also=("kernel-differs",)
    ),
    Kind(value.dispatch_mode, "built", "kernel-differs", _INPUT, when="first"),
    Kind(
        value.function_mode, "built", "kernel-differs", _INPUT, when="first", why=_SKEWED, also=("structure-differs",)
    ),
    # ---- Code that runs once, or on one replica
    Kind(once.clamp_bias, "before", "unreplayed-state", _FORWARD, is_once=True),
    Kind(once.clamp_bias, "before", "structure-differs", _FORWARD),
    Kind(once.clamp_bias, "before", "unreplayed-state", _WEIGHTS, "D", is_once=True),
    Kind(once.scale_head, "stepped", "unreplayed-state", _WEIGHTS, "LTD", is_once=True, tensor="head.weight"),
    Kind(once.scale_head, "stepped", "structure-differs", _WEIGHTS, "LT", tensor="head.weight"),
    Kind(once.zero_unit, "stepped", "unreplayed-state", _WEIGHTS, "LTD", is_once=True, tensor="head.weight"),
    Kind(once.forward_of_body, "inputs", "unreplayed-state", ("buffers",), is_once=True),
    Kind(once.forward_of_body, "inputs", "structure-differs", ("buffers",)),
    Kind(
        once.forward_with_dropout,
        "inputs",
        "generators-differ",
        ("buffers",),
        is_once=True,
        why=_RERUN,
        also=("unreplayed-state",),
    ),
    Kind(
        once.load_earlier_weights,
        "before",
        "unreplayed-state",
        ("buffers",),
        is_once=True,
        helpers={"built": once.keep_built},
    ),
    Kind(
        once.load_earlier_weights,
        "before",
        "unreplayed-state",
        _WEIGHTS,
        "D",
        is_once=True,
        helpers={"built": once.keep_built},
    ),
    Kind(once.load_optimizer, "gradients", "unreplayed-state", _OPTIMIZER, "LTD", is_once=True),
    Kind(once.average_weights, "stepped", "unreplayed-state", _WEIGHTS, "LTD", is_once=True),
    Kind(once.extra_backward, "loss", "unreplayed-state", _GRADIENTS, is_once=True),
    Kind(once.extra_backward, "loss", "structure-differs", _GRADIENTS),
    Kind(once.double_gradients, "gradients", "unreplayed-state", _GRADIENTS, "LTD", is_once=True),
    Kind(once.double_gradients, "gradients", "structure-differs", _GRADIENTS, "LTD"),
    Kind(
        once.drop_gradient,
        "gradients",
        "structure-differs",
        _GRADIENTS,
        "LTD",
        is_once=True,
        why="one replica has no gradient of this name, which the comparison shows",
        also=("unreplayed-state",),
    ),
    Kind(once.nan_to_zero, "gradients", "unreplayed-state", _GRADIENTS, "LTD", is_once=True),
    Kind(once.nan_to_zero, "gradients", "structure-differs", _GRADIENTS, "LTD"),
    Kind(once.skip_step, "built", "unreplayed-state", _OPTIMIZER, "LTD", is_once=True, when="at"),
    Kind(once.step_twice, "built", "unreplayed-state", _OPTIMIZER, "LTD", is_once=True, when="at"),
    Kind(once.skip_zero_grad, "built", "unreplayed-state", _GRADIENTS, is_once=True, when="at"),
    Kind(once.never_zero_grad, "built", "structure-differs", _GRADIENTS, when="at", at=2),
    Kind(
        once.evaluation_mode_for_a_step,
        "inputs",
        "unreplayed-state",
        ("buffers",),
        why="modules are in another mode for one step, in which dropout draws nothing",
        also=_DRAWS,
        is_once=True,
        helpers={"loss": once.back_to_training},
    ),
    Kind(
        once.count_in_attribute,
        "hidden",
        "structure-differs",
        _FORWARD,
        when="at",
        is_always=True,
        why="a replay restores the attribute, and then repeats the branch; without that it runs once",
        also=("unreplayed-state",),
    ),
    Kind(once.count_in_file, "hidden", "unreplayed-state", _FORWARD, when="at", is_always=True),
    Kind(once.count_in_variable, "hidden", "unreplayed-state", _FORWARD, is_once=True),
    Kind(once.rescale_buffers, "before", "unreplayed-state", ("buffers",), is_once=True),
    Kind(once.negate_element, "gradients", "unreplayed-state", _WEIGHTS, "LT", is_once=True, is_small=True),
    Kind(once.halve_element, "gradients", "unreplayed-state", _GRADIENTS, "LT", is_once=True, is_small=True),
    Kind(once.set_bit_of_buffer, "stepped", "unreplayed-state", ("buffers",), "LT", is_once=True, is_small=True),
    # ---- Data
    Kind(data.shuffled_by_rank, "sample", "batch-differs", ("batch",)),
    Kind(data.sorted_differently, "sample", "batch-differs", ("batch",)),
    Kind(data.dropped_on_one, "sample", "batch-differs", ("batch",)),
    Kind(data.altered_file, "sample", "batch-differs", ("batch",)),
    Kind(data.augmented_with_own_generator, "sample", "batch-differs", ("batch",)),
    Kind(
        data.augmented_with_global_generator,
        "sample",
        "batch-differs",
        ("batch",),
        why="the samples differ, and the generator is drawn from on one replica only",
        also=_DRAWS,
    ),
    Kind(data.augmented_by_rank, "sample", "batch-differs", ("batch",)),
    Kind(data.hashed_label, "sample", "batch-differs", ("batch",)),
    Kind(data.hashed_feature, "sample", "batch-differs", ("batch",)),
    Kind(data.normalised_by_own_part, "sample", "batch-differs", ("batch",)),
    Kind(data.shuffled_by_rank, "sample", "none", (), "D", "each rank has its own batch"),
    Kind(data.sampled_by_rank, "indices", "indices-differ", ("indices",), "L"),
    Kind(data.rotated_indices, "indices", "indices-differ", ("indices",), "L"),
    # ---- Evaluation
    Kind(data.evaluates_in_training_mode, "built", "evaluation-differs", ("predictions",), when="evaluation"),
    Kind(data.evaluates_scaled, "evaluation", "evaluation-differs", ("predictions",)),
    Kind(
        data.evaluates_other_samples,
        "validation",
        "batch-differs",
        ("batch", "predictions"),
        why="the samples of the evaluation differ, and with them the predictions",
        also=("evaluation-differs",),
    ),
    # ---- Build
    Kind(data.build_seeded_by_rank, "building", "build-not-seeded", _WEIGHTS, "T"),
    Kind(
        data.build_seeded_by_rank,
        "building",
        "unexplained",
        _WEIGHTS,
        "L",
        "a library sees the weights of a loop after they were built, and cannot build them again",
        also=("build-not-seeded", "generators-differ"),
    ),
    Kind(data.build_unseeded, "building", "build-not-seeded", _WEIGHTS, "T"),
    Kind(data.build_draws_more, "building", "build-rng-differs", _WEIGHTS, "T", also=_DRAWS, why="both are this"),
    Kind(data.build_extra_layer, "built", "build-rng-differs", _RNG, "T", also=_DRAWS, why="both are this"),
    Kind(data.build_extra_layer, "built", "generators-differ", _RNG, "L"),
    Kind(data.weights_of_own_generator, "built", "build-not-seeded", _WEIGHTS, "T"),
    Kind(data.weights_by_rank, "built", "host-value-differs", _WEIGHTS, "T"),
    Kind(
        data.weights_by_rank,
        "built",
        "unexplained",
        _WEIGHTS,
        "L",
        "a library sees the weights of a loop after they were built, and cannot build them again",
    ),
    Kind(data.loaded_on_one, "built", "structure-differs", _WEIGHTS, "T"),
    Kind(data.other_layer, "built", "structure-differs", _WEIGHTS),
    Kind(data.untied, "built", "structure-differs", _WEIGHTS),
    Kind(data.optimizer_of_a_copy, "built", "optimizer-not-bound", (), "T", when="before-training"),
    Kind(data.scheduler_of_a_copy, "built", "scheduler-not-bound", (), "T", when="before-training"),
    Kind(data.inner_scheduler_of_a_copy, "built", "scheduler-not-bound", (), "T", when="before-training"),
    Kind(data.head_left_out, "built", "parameters-not-optimized", (), "T", when="before-training"),
    Kind(data.learning_rate_of_zero, "built", "not-learning", (), "T", when="before-training"),
    Kind(data.wrong_for_all, "loss", "none", (), "LTD", "all replicas make the same mistake"),
    Kind(data.seeded_for_all, "before", "none", (), "LTD", "all replicas make the same mistake"),
    # ---- DistributedDataParallel
    Kind(ddp.buffers_not_broadcast, "built", "unexplained", ("buffers",), "D", when="first"),
    Kind(
        ddp.frozen_after_wrap,
        "wrapped",
        "structure-differs",
        _GRADIENTS,
        "D",
        when="first",
        helpers={"built": ddp.find_unused},
    ),
    Kind(ddp.comm_hook_on_one, "wrapped", "unexplained", _GRADIENTS, "D", when="first"),
    Kind(ddp.never_synchronized, "wrapped", "unexplained", _GRADIENTS, "D", when="first"),
    Kind(
        ddp.use_own_loss,
        "loss",
        "unexplained",
        ("gradients", "optimizer"),
        "D",
        when="first",
        is_always=True,
        helpers={"wrapped": ddp.own_loss_around_ddp},
    ),
    Kind(ddp.codebook_of_local_batch, "inputs", "unreplayed-state", _WEIGHTS, "D", is_once=True),
    Kind(ddp.plain_forward, "wrapped", "unexplained", _GRADIENTS, "D", when="first"),
    Kind(ddp.weights_after_wrap, "wrapped", "unexplained", _WEIGHTS, "D"),
)
"""The kinds. A function that is planted both once and in each step is two kinds."""
