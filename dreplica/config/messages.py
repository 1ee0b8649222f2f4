"""Errors about config keys as data, and the hints that go into their text.

A `UsageError` made here has a `code` and the fields `key`, `problem`, `fix` and `source`. Its text is rendered from
them: `{source}: {key}: {problem}. {fix}`. Code and tests look at the fields, people read the text.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from dreplica.errors import UsageError

COMMAND_LINE = "command line"
"""Source of a value that was given on the command line."""


def config_error(code: str, key: str, problem: str, fix: str = "", *, source: str = "", **data: Any) -> UsageError:
    """Create a `UsageError` about one config key.

    Args:
        code: Stable identifier of the kind of error.
        key: Dotted config key or command-line option, such as `train.epochs`.
        problem: What is wrong with the value, without a final period.
        fix: What to do about it, as whole sentences.
        source: Where the value was given: a file, or `COMMAND_LINE`. Empty if unknown.
        **data: Further fields, such as `value` and `expected`.
    """
    start = f"{source}: {key}" if source else key
    text = f"{start}: {problem}. {fix}" if fix else f"{start}: {problem}."
    return UsageError(text, code=code, key=key, problem=problem, fix=fix, source=source, **data)


def invalid_value(key: str, value: Any, expected: str, fix: str = "", **data: Any) -> UsageError:
    """Create a `UsageError` about a value, as in `train.epochs: expected an integer, got 'many'.`

    Args:
        key: Dotted config key or command-line option.
        value: The value that was given.
        expected: What the key accepts, such as `an integer`.
        fix: What to do about it, as whole sentences. Empty where `expected` says enough.
        **data: Further fields, such as `source`.
    """
    problem = f"expected {expected}, got {show(value)}"
    return config_error("invalid-value", key, problem, fix, value=value, expected=expected, **data)


def empty_config() -> UsageError:
    """Create the `UsageError` about an empty value of `--config`."""
    return config_error("empty-path", "--config", "the path is empty", "Name a YAML file.", source=COMMAND_LINE)


def locate(error: UsageError, source: str, prefix: str = "") -> UsageError:
    """Return a copy of a config error that says where the value was given.

    Args:
        error: An error made by this module.
        source: Where the value was given: a file, or `COMMAND_LINE`.
        prefix: Put before the key, such as `overrides.1.`.
    """
    fields = error.fields | {"key": prefix + error.fields["key"], "source": source}
    return config_error(error.code, **fields)


def join_errors(errors: list[UsageError]) -> UsageError:
    """Return the only error, or one error whose text has a line for each and whose field `errors` lists them."""
    if len(errors) == 1:
        return errors[0]
    return UsageError("\n  ".join(map(str, errors)), code="invalid-config", errors=errors)


def closest(word: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name that `word` most likely misspells or abbreviates.

    Args:
        word: What was given.
        valid: Names that are valid.
        cutoff: Smallest similarity that counts, from 0 to 1. An abbreviation always counts.

    Returns:
        The only name that begins with `word`, or else the closest name, or None if none is similar enough.
    """
    folded: dict[str, str] = {}
    for name in sorted(valid):
        folded.setdefault(name.lower(), name)
    if word:
        extended = [name for name in folded if name.startswith(word.lower())]
        if len(extended) == 1:
            return folded[extended[0]]
    close = difflib.get_close_matches(word.lower(), folded, n=5, cutoff=cutoff)
    # difflib finds Adma closer to Adamax than to Adam: a swap costs it twice, an addition nothing.
    best = max(close, key=lambda name: _similarity(word.lower(), name), default=None)
    return None if best is None else folded[best]


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return a hint for a misspelled name: the closest valid name, or the valid names (20 at most)."""
    names = sorted(valid)
    match = closest(word, names)
    if match is not None:
        return f"Did you mean {match!r}?"
    return f"Choose one of: {', '.join(names[:20])}{', …' if len(names) > 20 else '.'}"


def show(value: Any) -> str:
    """Return a value as a user writes it in YAML, at most 80 characters long."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"


def _similarity(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, name, word).ratio() - 0.03 * abs(len(name) - len(word))
