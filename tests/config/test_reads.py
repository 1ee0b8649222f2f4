"""Which settings a function reads."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from dreplica.config.reads import Reads
from dreplica.config.schema import DataConfig, RunConfig

KEYS = ("criterion.name", "optim.lr", "optim.momentum", "optim.name", "schedule.name", "schedule.step_size")
KEPT: list[Any] = []


def config() -> RunConfig:
    return RunConfig.model_validate(
        {"optim": {"lr": 0.5, "momentum": 0.9}, "schedule": {"name": "StepLR", "step_size": 3}}
    )


def kept(value: Any) -> None:
    KEPT.append(value)


READING: dict[str, tuple[Callable[[RunConfig], Any], set[str]]] = {
    "nothing": (lambda c: None, set()),
    "another section": (lambda c: c.data.batch_size, set()),
    "a key": (lambda c: c.optim.lr, {"optim.lr"}),
    "an undeclared key": (lambda c: c.optim.momentum, {"optim.momentum"}),
    "the arguments": (lambda c: c.optim.arguments, {"optim.lr", "optim.momentum"}),
    "a key by name": (lambda c: getattr(c.schedule, "name"), {"schedule.name"}),  # noqa: B009
    "a section as a dict": (lambda c: dict(c.schedule), {"schedule.name", "schedule.step_size"}),
    "a section dumped": (lambda c: c.optim.model_dump(), {"optim.lr", "optim.momentum", "optim.name"}),
    "a section's text": (lambda c: repr(c.criterion), {"criterion.name"}),
    "vars": (lambda c: vars(c.criterion), {"criterion.name"}),
    "a copy": (lambda c: copy.deepcopy(c.criterion).name, {"criterion.name"}),
    "the whole config": (lambda c: c.to_yaml(), set(KEYS)),
    "a changed copy": (lambda c: c.model_copy(update={"inject": []}), set(KEYS)),
    "a kept section": (lambda c: kept(c.optim), {"optim.lr", "optim.momentum", "optim.name"}),
    "a kept config": (lambda c: kept(c), set(KEYS)),
}


@pytest.mark.parametrize(("read", "keys"), READING.values(), ids=READING.keys())
def test_unread_leaves_out_what_was_read(read: Callable[[RunConfig], Any], keys: set[str]) -> None:
    reads = Reads()
    read(reads.of(config()))
    assert reads.unread(KEYS) == sorted(set(KEYS) - keys)
    KEPT.clear()


def test_recording_copy_is_of_the_same_type_and_value() -> None:
    original = config()
    given = Reads().of(original)
    assert isinstance(given, RunConfig)
    assert isinstance(given.data, DataConfig)
    assert given.model_dump() == original.model_dump()
    assert given.optim.model_extra == original.optim.model_extra
    assert given.to_yaml() == original.to_yaml()


def test_prefix_names_a_section_alone() -> None:
    reads = Reads()
    _ = reads.of(DataConfig(), "data.").root
    assert reads.unread(["data.root", "data.split_seed"]) == ["data.split_seed"]
