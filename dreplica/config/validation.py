"""Turn pydantic's validation errors into errors that name the key as the user writes it."""

from collections.abc import Callable, Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from dreplica.config.messages import closest, config_error, invalid_value, join_errors, locate, nearest, show
from dreplica.errors import UsageError


def describe_errors(
    errors: Iterable[ErrorDetails], root: type[BaseModel], source: Callable[[str], str], prefix: str = ""
) -> UsageError:
    """Convert the errors of a `ValidationError` into one `UsageError`, with one line for each key.

    Args:
        errors: As `ValidationError.errors()` returns them.
        root: The model that was validated.
        source: Returns where the value of a dotted key was given: a file, or `COMMAND_LINE`.
        prefix: Put before each key, such as `overrides.1.`.
    """
    by_key: dict[str, list[UsageError]] = {}
    for details in errors:
        for error in _describe(details, root):
            by_key.setdefault(error.fields["key"], []).append(error)
    located = []
    for key, problems in by_key.items():
        # One branch of a union may report the key, and another a key below it: the deeper one is more precise.
        if not any(other.startswith(f"{key}.") for other in by_key):
            located.append(locate(_combine(problems), source(key), prefix))
    return join_errors(located)


def _combine(problems: list[UsageError]) -> UsageError:
    """Return one error for a key: the branches of a union each expect something else."""
    first = problems[0]
    if any(problem.code != "invalid-value" for problem in problems):
        return first
    expected = " or ".join(dict.fromkeys(problem.fields["expected"] for problem in problems))
    fix = next((problem.fields["fix"] for problem in problems if problem.fields["fix"]), "")
    return invalid_value(first.fields["key"], first.fields["value"], expected, fix)


def _describe(error: ErrorDetails, root: type[BaseModel]) -> list[UsageError]:
    """Return the errors behind one pydantic error, without a source."""
    keys, parent, annotation = _follow(error["loc"], root)
    key, kind, value = ".".join(keys), error["type"], error["input"]
    if kind == "invalid_key" or (kind == "string_type" and error["loc"][-1] == "[key]"):
        key = ".".join([*keys[:-1], show(value)])
        hint = "" if parent.model_config["extra"] == "allow" else nearest(show(value), parent.model_fields)
        return [config_error("unknown-key", key, "unknown key, expected text", hint, value=value)]
    if kind == "missing":
        return [config_error("missing-value", key, "a value is required", f"Add {keys[-1]}: VALUE.")]
    if kind == "extra_forbidden":
        return [config_error("unknown-key", key, "unknown key", _hint(keys[-1], parent, root))]
    if kind == "recursion_loop":
        return [config_error("recursive-value", key, "the value contains itself", "Write it out.")]
    if kind == "value_error":
        cause = error.get("ctx", {}).get("error")
        nested = cause.fields.get("errors", [cause]) if isinstance(cause, UsageError) else []
        if nested and all("key" in item.fields for item in nested):
            return nested
        return [config_error("rejected-value", key, str(cause).removesuffix("."), value=value)]
    names = _choices(annotation)
    match = closest(value, names) if kind == "literal_error" and isinstance(value, str) else None
    fix = "" if match is None else f"Did you mean {match!r}?"
    return [invalid_value(key, value, _expected(error, key, root, parent), fix)]


def _expected(error: ErrorDetails, key: str, root: type[BaseModel], parent: type[BaseModel]) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "int_type" | "int_from_float" | "int_parsing":
            return "an integer"
        case "float_type":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "string_type":
            return "text"
        case "bool_type":
            return "true or false"
        case "literal_error":
            return context["expected"]
        case "greater_than":
            return f"a value > {context['gt']:.12g}"
        case "greater_than_equal":
            return f"a value >= {context['ge']:.12g}"
        case "less_than":
            return f"a value < {context['lt']:.12g}"
        case "less_than_equal":
            return f"a value <= {context['le']:.12g}"
        case "model_type":
            section = _follow([*error["loc"], ""], root)[1]
            return f"keys with values, such as {key}.{next(iter(section.model_fields))}"
        case "dict_type":
            return "keys with values, such as {a: 1}"
        case "list_type":
            item = _follow([*error["loc"], 0, ""], root)[1]
            return "a list, such as [1, 2]" if item is parent else f"a list, such as [{_example(item)}]"
    return error["msg"].removeprefix("Input should be ")


def _hint(key: str, parent: type[BaseModel], root: type[BaseModel]) -> str:
    """Return the hint for an unknown key: a similar one here, the same one in another section, or all valid ones."""
    if closest(key, parent.model_fields) is None:
        for section, field in root.model_fields.items():
            model = field.annotation
            if isinstance(model, type) and issubclass(model, BaseModel) and key in model.model_fields:
                return f"Did you mean {section}.{key}?"
    return nearest(key, parent.model_fields)


def _follow(location: Iterable[int | str], root: type[BaseModel]) -> tuple[list[str], type[BaseModel], Any]:
    """Return the keys a user writes for pydantic's `location`, the section of the last key, and its annotation.

    Pydantic adds the branch of a union that it tried to the location (`int`, `constrained-int`, `literal[...]`).
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
    return keys, parent, annotation


def _choices(annotation: Any) -> list[str]:
    """Return the words that an annotation accepts: of `Literal["a", "b"] | None`, `["a", "b"]`."""
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    if get_origin(annotation) in {Union, UnionType, Annotated}:
        return [word for branch in get_args(annotation) for word in _choices(branch)]
    return []


def _example(section: type[BaseModel]) -> str:
    """Return the required keys of a section: `{replica: …, step: …}`."""
    required = [name for name, field in section.model_fields.items() if field.is_required()]
    return "{" + ", ".join(f"{name}: …" for name in required) + "}"


def _name(branch: Any) -> str:
    """Return how pydantic begins the name of a union's branch: `list` for list[int]."""
    while get_origin(branch) is Annotated:
        branch = get_args(branch)[0]
    return getattr(get_origin(branch) or branch, "__name__", "")
