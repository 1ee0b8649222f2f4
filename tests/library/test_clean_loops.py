"""Loops without a mistake: over 200 steps, no warning and no divergence.

These are the loops of tests/library/loops.py, and each example of docs/library.md without its plant.
"""

import logging
import os
import tempfile
import warnings
from functools import cache
from typing import Any

import pytest
import torch.distributed as dist

from dreplica.distributed.process_group import World
from tests.harness import run_replicas
from tests.library.loops import LOOPS
from tests.library.page import Example, examples_of, run
from tests.library.test_loops import HEAVY, PAGE

pytestmark = pytest.mark.xdist_group("library")

_EPOCHS = 50
"""An epoch has four steps."""

_NO_PLANTS = {
    "if rank == 1 and step == 4:": "if False:",
    "train(0.5, record=": "train(1.0, record=",
    "if rank == 1 and step == 3:": "if False:",
    "if rank == 0 and step == 2:": "if False:",
    "hidden * 1.001 if rank == 1 else hidden": "hidden",
    "model[:2].parameters()": "model.parameters()",
}
"""The mistakes on the page, and what replaces them."""

_MORE_STEPS = {
    "inputs.split(10), labels.split(10)))": "inputs.split(10), labels.split(10))) * 102",
    '("runs/d", 0, 3)': '("runs/d", 0, 100)',
    '("runs/d", 3, 6, saved)': '("runs/d", 100, 200, saved)',
    '("runs/e", 0, 6)': '("runs/e", 0, 200)',
    "range(30)": "range(200)",
    "max_epochs=1": "max_epochs=100",
    "num_train_epochs=1": "num_train_epochs=67",
}
"""What makes the examples of the page long."""


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _edited(code: str) -> str:
    for old, new in {**_NO_PLANTS, **_MORE_STEPS}.items():
        code = code.replace(old, new)
    return code


def _run_all(world: World, folder: str) -> dict[str, Any]:
    """Return the number of steps and the warnings of each loop, and output and warnings of each example."""
    warnings.simplefilter("ignore")
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # by which Lightning knows that the ranks are there already
    records = _Warnings()
    logging.getLogger("dreplica").addHandler(records)
    results: dict[str, Any] = {}
    for name, loop in LOOPS.items():
        agreement = loop(False, _EPOCHS)
        found = [each.text for each in agreement.warnings]
        results[name] = agreement.steps_checked, [*found, *records.texts]
        records.texts.clear()
    dist.init_process_group = lambda *_: None  # it is there already
    os.chdir(folder)
    beginning, examples = examples_of(PAGE)
    for number, example in enumerate(examples):
        printed = run(_edited(beginning), Example(_edited(example.code), ""))
        results[f"example {number}"] = printed, [*records.texts]
        records.texts.clear()
    return results


@cache
def results() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return run_replicas(_run_all, 2, folder, imports=HEAVY, timeout=400.0)


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", LOOPS)
def test_clean_loop_gives_no_warning(name: str) -> None:
    for row in results():
        assert isinstance(row, dict), row
        assert row[name] == (4 * _EPOCHS, [])


@pytest.mark.timeout(500)
def test_clean_examples_give_no_warning() -> None:
    _, examples = examples_of(PAGE)
    for row in results():
        assert isinstance(row, dict), row
        for number, example in enumerate(examples):
            printed, found = row[f"example {number}"]
            assert not found, f"{example.code}\n{found}"
            assert "diverged" not in printed, f"{example.code}\n{printed}"


def test_each_edit_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [old for old in (*_NO_PLANTS, *_MORE_STEPS) if old not in page] == []
