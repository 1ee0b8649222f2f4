"""Settings that would be ignored because of another one, which are errors.

Only settings that a user has chosen count, on the command line or in their own file: a default, or a key of a
config that ships with dreplica, gives way. A value that asks for what happens anyway is not ignored, such as
`snapshot_every: 0` with `every: 0`.

Settings that a user's function may read (`replica.factory`, `data.name`) are checked when it has returned: see
`dreplica.config.reads`. Settings that depend on the data are checked where the data are loaded.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dreplica.config.messages import config_error, show
from dreplica.config.schema import RunConfig
from dreplica.errors import UsageError

CODE = "ignored-setting"
_UNNAMED_TARGETS = ("batch", "indices", "rng")


@dataclass(frozen=True)
class Rule:
    """A condition under which some settings have no effect."""

    keys: tuple[str, ...]
    """The dotted keys that have no effect."""
    reason: Callable[[RunConfig], str | None]
    """Returns why they have none, such as `data.augment is null`, or None if they have an effect."""
    fix: str
    """What to do about it, as whole sentences."""
    off: Any = None
    """The value that asks for nothing, which is therefore accepted."""


def _is(key: str, value: Any, applies: bool, more: str = "") -> str | None:
    return f"{key} is {show(value)}{more}" if applies else None


def _independent(config: RunConfig) -> str | None:
    if config.agreement.expect == "independent":
        return "agreement.expect is 'independent'"
    seed = config.seed.model
    distinct = seed == "distinct" or (isinstance(seed, list) and len(set(seed)) > 1)
    return _is("seed.model", seed, config.agreement.expect == "auto" and distinct, ", so states may differ")


def _stops_later(config: RunConfig) -> str | None:
    stop, last = config.run.stop_after, config.train.max_steps
    return _is("train.max_steps", last, stop is not None and last is not None and stop >= last, ", the last step")


RULES: tuple[Rule, ...] = (
    Rule(
        ("model.name",),
        lambda c: _is("model.factory", c.model.factory, c.model.factory is not None),
        "Remove it, or set model.factory to null.",
    ),
    Rule(
        ("schedule.per",),
        lambda c: _is("schedule.name", None, c.schedule.name is None and c.replica.factory is None),
        "Remove it, or set schedule.name, such as StepLR.",
    ),
    Rule(
        ("data.root",),
        lambda c: _is("data.name", c.data.name, c.data.name == "digits", ", which scikit-learn ships"),
        "Remove it, or set data.name, such as imagefolder.",
    ),
    Rule(
        ("seed.augment",),
        lambda c: _is("data.augment", None, c.data.augment is None),
        "Remove it, or set data.augment, such as flip.",
    ),
    Rule(
        ("run.stop_after",),
        _stops_later,
        "Remove it, or choose an earlier step.",
    ),
    Rule(
        ("train.accumulate",),
        lambda c: _is("data.batch_size", c.data.batch_size, c.train.accumulate > c.data.batch_size),
        "Choose at most one micro-batch per sample.",
    ),
    Rule(
        ("determinism.fill_uninitialized_memory", "determinism.cublas_workspace_config"),
        lambda c: _is("determinism.mode", "off", c.determinism.mode == "off"),
        "Remove it, or set determinism.mode to strict or warn.",
        off=False,
    ),
    Rule(
        (
            "determinism.cudnn_benchmark",
            "determinism.cudnn_deterministic",
            "determinism.tf32",
            "determinism.reduced_precision_reduction",
            "determinism.cublas_workspace_config",
        ),
        lambda c: _is("world.device", "cpu", c.world.device == "cpu"),
        "Remove it, or set world.device to auto.",
        off=False,
    ),
    Rule(
        ("checkpoint.keep",),
        lambda c: (
            "checkpoint.every_steps and checkpoint.every_epochs are null"
            if c.checkpoint.every_steps is None and c.checkpoint.every_epochs is None
            else None
        ),
        "Remove it, or set checkpoint.every_epochs, such as 1.",
    ),
    Rule(
        ("agreement.snapshot_every", "agreement.on_divergence"),
        lambda c: _is("agreement.every", 0, c.agreement.every == 0),
        "Remove it, or set agreement.every to 1.",
        off=0,
    ),
    Rule(
        ("agreement.snapshot_every",),
        lambda c: _independent(c) if c.agreement.every else None,
        "Remove it: only a divergence of identical replicas is replayed.",
        off=0,
    ),
    Rule(
        ("run.reference",),
        lambda c: _is("agreement.every", 0, c.agreement.every == 0),
        "Remove it, or set agreement.every to 1.",
    ),
)
"""Every rule that depends on the config alone, except those of faults (`_of_faults`)."""


def find_ignored(config: RunConfig, chosen: Collection[str], prefix: str = "") -> list[UsageError]:
    """Return an error for each setting that was chosen and has no effect.

    Args:
        config: The config of a replica.
        chosen: The dotted keys that a user has chosen, such as `model.name` and `inject`.
        prefix: Put before each key, such as `overrides.1.`.
    """
    found = [error for rule in RULES for error in _of_rule(rule, config, chosen, prefix)]
    return [*found, *(_of_faults(config) if "inject" in chosen else ())]


def ignored_setting(keys: Iterable[str], reason: str, fix: str) -> UsageError:
    """Create the error about settings that have no effect.

    Args:
        keys: The dotted keys, at least one.
        reason: Why they have none, such as `data.augment is null`.
        fix: What to do about it, as whole sentences.
    """
    first, *others = keys
    if not others:
        return config_error(CODE, first, f"this setting has no effect because {reason}", fix, reason=reason, others=[])
    problem = f"this and {', '.join(others)} have no effect because {reason}"
    return config_error(CODE, first, problem, fix, reason=reason, others=others)


def _of_rule(rule: Rule, config: RunConfig, chosen: Collection[str], prefix: str) -> Iterator[UsageError]:
    reason = rule.reason(config)
    if reason is None:
        return
    for dotted in rule.keys:
        section, _, key = dotted.partition(".")
        value = getattr(getattr(config, section), key)
        if dotted in chosen and value is not None and (rule.off is None or value != rule.off):
            problem = f"{show(value)} has no effect because {reason}"
            yield config_error(CODE, prefix + dotted, problem, rule.fix, value=value, reason=reason)


def _of_faults(config: RunConfig) -> Iterator[UsageError]:
    """Yield an error for each fault that is not injected or not found, and for each unused key of a fault."""
    last = config.train.max_steps
    if config.inject and config.agreement.every == 0:
        reason = "agreement.every is 0"
        problem = f"no fault is found at its step because {reason}"
        yield config_error(CODE, "inject", problem, "Remove it, or set agreement.every to 1.", reason=reason)
    for index, fault in enumerate(config.inject):
        flips = next((name for name in ("scale", "bit") if getattr(fault, name) is not None), None)
        if flips is not None and fault.bits != 1:
            reason = f"inject.{index}.{flips} is {show(getattr(fault, flips))}"
            problem = f"{fault.bits} has no effect because {reason}"
            yield config_error(CODE, f"inject.{index}.bits", problem, "Remove it.", value=fault.bits, reason=reason)
        if fault.scale is not None and fault.bit is not None:
            reason = f"inject.{index}.scale is {show(fault.scale)}"
            problem = f"{fault.bit} has no effect because {reason}"
            yield config_error(CODE, f"inject.{index}.bit", problem, "Remove it.", value=fault.bit, reason=reason)
        if fault.tensor is not None and fault.target in _UNNAMED_TARGETS:
            reason = f"inject.{index}.target is {fault.target!r}, which has no named tensors"
            problem = f"{fault.tensor!r} has no effect because {reason}"
            yield config_error(CODE, f"inject.{index}.tensor", problem, "Remove it.", value=fault.tensor, reason=reason)
        if last is not None and fault.step > last:
            reason = f"train.max_steps is {last}"
            problem = f"{fault.step} has no effect because {reason}"
            fix = f"Choose a step from 1 to {last}."
            yield config_error(CODE, f"inject.{index}.step", problem, fix, value=fault.step, reason=reason)
