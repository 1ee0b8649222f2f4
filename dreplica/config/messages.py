"""messages"""

import difflib
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from dreplica.errors import UsageError


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint on what `word` may have been meant to be: the nearest of `valid`, or all of them when few."""
    names = sorted(valid)
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(name.lower(), name)
    close = difflib.get_close_matches(word.lower(), folded, n=5, cutoff=0.6)
    if close:
        # difflib finds Adma closer to Adamax than to Adam: a swap costs it twice, an addition nothing.
        best = max(close, key=lambda name: _similarity(word.lower(), name))
        return f"Did you mean {folded[best]!r}?"
    if len(names) > 20:
        return f"Valid are for instance: {', '.join(names[:20])}, …"
    return f"Valid are: {', '.join(names)}."


def describe_errors(errors: Iterable[ErrorDetails], root: type[BaseModel], source: Callable[[str], str]) -> UsageError:
    """All of a ValidationError in one `UsageError`: a line for each key, with value and remedy.

    `source`: where the value of a key (dotted) was given, as text to begin its line with.
    """
    by_key: dict[str, list[str]] = {}
    for error in errors:
        key, problem = _describe(error, root)
        by_key.setdefault(key, []).append(problem)
    lines = []
    for key, problems in by_key.items():
        if any(other.startswith(f"{key}.") for other in by_key):
            continue  # a union: the branch that got furthest says it best
        head, tail = problems[0], ""
        if all(_EXPECTED in problem for problem in problems):
            head, _, _ = head.partition(_EXPECTED)
            expected = dict.fromkeys(problem.partition(_EXPECTED)[2].removesuffix(".") for problem in problems)
            tail = f"{_EXPECTED}{' or '.join(expected)}."
        lines.append(f"{source(key)}{head}{tail}")
    return UsageError("\n  ".join(lines))


_EXPECTED = " will not do: it should be "


def _describe(error: ErrorDetails, root: type[BaseModel]) -> tuple[str, str]:
    """The key (dotted) and one line for one pydantic error; the line names key, value and what would do."""
    keys, parent = _follow(error["loc"], root)
    key = ".".join(keys)
    if error["type"] == "invalid_key" or (error["type"] == "string_type" and error["loc"][-1] == "[key]"):
        keys[-1] = show(error["input"])
        hint = "" if parent.model_config["extra"] == "allow" else f" {nearest(keys[-1], parent.model_fields)}"
        return ".".join(keys), f"{'.'.join(keys)}: unknown key; keys are words.{hint}"
    if error["type"] == "missing":
        return key, f"{key}: it has no value and needs one. Write {keys[-1]}: VALUE."
    if error["type"] == "extra_forbidden":
        hint = nearest(keys[-1], parent.model_fields)
        if not hint.startswith("Did you mean"):
            hint = _where_it_belongs(keys[-1], root) or hint
        return key, f"{key}: unknown key. {hint}"
    if error["type"] == "value_error":
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, UsageError):
            return str(cause).split(":", 1)[0], str(cause)
        return key, f"{key}: {cause}"
    message = error["msg"].removeprefix("Input should be ")
    if error["type"] == "model_type":
        message = f"keys with values, such as {key}.{next(iter(_follow([*error['loc'], ''], root)[1].model_fields))}"
    elif error["type"] == "list_type":
        item = _follow([*error["loc"], 0, ""], root)[1]
        message = "a list, such as [1, 2]" if item is parent else f"a list, such as [{_example(item)}]"
    elif error["type"] == "dict_type":
        message = "keys with values, such as {a: 1}"
    elif error["type"] == "recursion_loop":
        return key, f"{key}: it contains itself. Write its value out."
    return key, f"{key}: {show(error['input'])}{_EXPECTED}{message}"


def _follow(location: Iterable[int | str], root: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The keys a user would write for pydantic's `location`, and the section that the last of them stands in.

    Pydantic puts the branch of a union that it tried into the location (`int`, `constrained-int`, `literal[...]`).
    """
    keys: list[str] = []
    parent, annotation = root, cast(Any, root)
    for part in location:
        origin, arguments = get_origin(annotation), get_args(annotation)
        while origin is Annotated:
            annotation = arguments[0]
            origin, arguments = get_origin(annotation), get_args(annotation)
        branches = [branch for branch in arguments if branch is not type(None)]
        if origin in {Union, UnionType} and len(branches) > 1:
            annotation = next((branch for branch in branches if str(part).startswith(_name(branch))), None)
            continue
        if origin in {Union, UnionType}:
            annotation = branches[0]
            origin, arguments = get_origin(annotation), get_args(annotation)
        if part != "[key]":  # pydantic's mark for a mapping's key rather than its value
            keys.append(str(part))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            parent = annotation
            field = parent.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
        else:
            annotation = arguments[-1] if origin in {list, dict} else None
    return keys, parent


def _example(section: type[BaseModel]) -> str:
    """What has to be given of a section: `{replica: …, step: …}`."""
    needed = [name for name, field in section.model_fields.items() if field.is_required()]
    return "{" + ", ".join(f"{name}: …" for name in needed) + "}"


def _name(branch: Any) -> str:
    """How pydantic begins the name of a union's branch: `list` for list[int]."""
    while get_origin(branch) is Annotated:
        branch = get_args(branch)[0]
    return getattr(get_origin(branch) or branch, "__name__", "")


def _where_it_belongs(key: str, root: type[BaseModel]) -> str:
    """A hint for `epochs` where `train.epochs` is meant."""
    for section, field in root.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel) and key in model.model_fields:
            return f"Did you mean {section}.{key}?"
    return ""


def _similarity(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, name, word).ratio() - 0.03 * abs(len(name) - len(word))


def show(value: Any) -> str:
    """A value as the user would write it, cut where it is long."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
