"""Checks of the arguments of `Agreement`."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict, get_type_hints

from dreplica.agreement.hasher import Hasher
from dreplica.agreement.reference import Reference
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.config.messages import closest, nearest
from dreplica.distributed.channel import Channel
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import INDEPENDENT_STAGES, STAGES

_LONGEST_SECONDS = 1e9
"""Longest timeout, which the backends of `torch.distributed` still accept."""
_LARGEST_COUNT = 2**39
"""Largest step and epoch. The records have 40 bits for a step."""


class InternalArguments(TypedDict, total=False):
    """Arguments of `Agreement` that only the trainer and the tests use."""

    trace: TraceWriter | None
    """The trace in which checked steps are recorded. Its algorithm must be that of `hasher`."""
    recorded: Reference | None
    """On rank 0, a recorded run to compare with. A difference raises `ReferenceDiffers`."""
    channel: Channel | None
    """The control channel between all replicas. By default a new gloo group."""
    hasher: Hasher | None
    """The hasher for the fingerprints, of the same kind on all replicas. By default negotiated between them."""
    stoppable: bool
    """Exchange the stop flag at every step, also at steps that are not compared."""
    quiet: bool
    """Leave it to the caller to say what was compared."""
    all_generators: bool
    """Compare the generators of Python and NumPy from the start, since the caller seeds them."""


def invalid_argument(name: str, value: Any, text: str, code: str = "invalid-argument") -> UsageError:
    """Return the error for an invalid argument.

    Args:
        name: The argument's name.
        value: The value that was passed.
        text: The message for people.
        code: The stable identifier for programs.

    Returns:
        The error, with `argument` and `value` among its fields.
    """
    return UsageError(text, code=code, argument=name, value=value)


def check_arguments(
    expect: Any,
    on_divergence: Any,
    lag: Any,
    every: Any,
    timeout: Any,
    steps_done: Any,
    internal: Mapping[str, Any],
) -> None:
    """Check the arguments of `Agreement` that depend on nothing else.

    Args:
        expect: As for `Agreement`.
        on_divergence: As for `Agreement`.
        lag: As for `Agreement`.
        every: As for `Agreement`.
        timeout: As for `Agreement`.
        steps_done: As for `Agreement`.
        internal: The further keyword arguments of `Agreement`.

    Raises:
        UsageError: If a value is invalid.
        TypeError: If a keyword argument does not exist.
    """
    if expect is not None:
        _check_choice("expect", expect, ("identical", "independent", "ddp"))
    _check_choice("on_divergence", on_divergence, ("stop", "continue"))
    _check_choice("lag", lag, (0, 1))
    _check_every(every)
    if not isinstance(timeout, int | float) or not 0 < timeout <= _LONGEST_SECONDS:
        text = f"timeout must be above 0 and at most 1e9 seconds, got {timeout!r}. Pass for example timeout=300."
        raise invalid_argument("timeout", timeout, text)
    if not _is_count(steps_done):
        text = f"steps_done must be a number of steps from 0, got {steps_done!r}. Pass it as an int, or omit it."
        raise invalid_argument("steps_done", steps_done, text)
    _check_internal(internal, internal.get("trace"))


def check_epoch(epoch: Any) -> None:
    """Raise `UsageError` unless an epoch is None or an integer that a trace can hold."""
    if epoch is not None and not _is_count(epoch):
        text = f"epoch must be an int from 0 or None, got {epoch!r}. Pass for example epoch=int(epoch)."
        raise invalid_argument("epoch", epoch, text)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_COUNT


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise `UsageError` unless `value` is one of `choices`, of which there are at least two."""
    if value not in choices:
        *first, last = map(repr, choices)
        match = closest(value, choices) if isinstance(value, str) and isinstance(choices[0], str) else None
        hint = "" if match is None else f" Did you mean {match!r}?"
        raise invalid_argument(name, value, f"{name} must be {', '.join(first)} or {last}, got {value!r}.{hint}")


def _check_every(every: Any) -> None:
    """Raise `UsageError` unless `every` is an integer of at least 0."""
    if not isinstance(every, int):
        text = f"every must be an integer, got {every!r}. Pass a number of steps, or 0 to disable comparisons."
        raise invalid_argument("every", every, text)
    if every < 0:
        raise invalid_argument("every", every, f"every must be >= 0, got {every}. Use 0 to disable comparisons.")


def check_stages(stages: Collection[str] | None, expect: str) -> None:
    """Raise `UsageError` for stages that do not exist or that `expect` does not compare."""
    if stages is None:
        return
    if isinstance(stages, str):
        text = f"stages must be a list of stage names, got {stages!r}. Use stages=[{stages!r}]."
        raise invalid_argument("stages", stages, text)
    if not stages:
        text = f"stages must name at least one stage, got {stages!r}. Omit it to compare every stage that must agree."
        raise invalid_argument("stages", stages, text)
    for name in stages:
        if name not in STAGES:
            raise invalid_argument("stages", stages, f"stages: {name!r} is not a stage. {nearest(str(name), STAGES)}")
        if expect == "independent" and name not in INDEPENDENT_STAGES:
            raise invalid_argument(
                "stages",
                stages,
                f"stages: {name!r} is not compared with expect='independent', only {', '.join(INDEPENDENT_STAGES)}. "
                "Remove it, or use expect='identical' with the stages that must agree.",
            )


def _check_internal(names: Iterable[str], trace: Any) -> None:
    """Raise an error for an unknown keyword argument or a trace that cannot be written to."""
    for name in names:
        if name not in get_type_hints(InternalArguments):
            raise TypeError(f"Agreement() got an unexpected keyword argument {name!r}")
    if not isinstance(trace, TraceWriter | None):
        text = f"trace must be a TraceWriter or None, got {type(trace).__name__}. It is internal: omit it."
        raise invalid_argument("trace", trace, text)


def check_algorithm(trace: TraceWriter, hasher: Hasher) -> None:
    """Raise `UsageError` unless the trace holds digests of the hasher's algorithm."""
    if trace.algorithm != hasher.algorithm:
        text = (
            f"trace has algorithm {trace.algorithm!r}, but digests are computed with {hasher.algorithm!r}. "
            "Create it with algorithm=hasher.algorithm."
        )
        raise invalid_argument("trace", trace.algorithm, text)


def path_of(name: str, value: str | os.PathLike[str] | None) -> str | None:
    """Return a path argument as text.

    Raises:
        UsageError: If the value is not a path.
    """
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or isinstance(value, bytes):
        text = f"{name} must be the path of a run folder, got {value!r}. Pass for example {name}='runs/a'."
        raise invalid_argument(name, value, text)
    path = os.fspath(value)
    if "\0" in path:
        text = f"{name} must be the path of a run folder, got {path!r}, which has a null byte. Pass {name}='runs/a'."
        raise invalid_argument(name, path, text)
    if not path:
        raise invalid_argument(name, path, f"{name} must be the path of a run folder, got ''. Pass {name}='runs/a'.")
    return path
