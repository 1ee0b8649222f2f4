"""What data sets hold: the split, names, rows, generators and files, compared between replicas."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import Dataset, Subset

from dreplica.agreement.verdict.advice import advise
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.evidence.data_source import compare_held, describe_held


class Samples(Dataset[Any]):
    """A data set with any attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.x = torch.arange(12.0).reshape(6, 2)
        vars(self).update(attributes)

    def __getitem__(self, index: int) -> Any:
        return self.x[index]


class Transform:
    """A transform with a generator."""

    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __call__(self, x: Any) -> Any:
        return x


def _numbered(*names: str) -> Samples:
    return Samples(numbers={name: number for number, name in enumerate(names)})


KINDS: dict[str, tuple[Callable[[int], Dataset[Any]], str, list[str], list[str]]] = {
    "split": (
        lambda r: Subset(Samples(), torch.randperm(6, generator=torch.Generator().manual_seed(r)).tolist()[:4]),
        "samples-differ",
        ["data-split-differs"],
        ["seed-split"],
    ),
    "split within": (
        lambda r: Samples(inner=[Subset(Samples(), range(r, r + 3))]),
        "samples-differ",
        ["data-split-differs"],
        ["seed-split"],
    ),
    "classes": (
        lambda r: _numbered(*(("cat", "dog") if r else ("dog", "cat"))),
        "samples-differ",
        ["data-names-moved"],
        ["number-in-order"],
    ),
    "vocabulary": (
        lambda r: Samples(words=["a", "b"] if r else ["b", "a"]),
        "samples-differ",
        ["data-names-moved"],
        ["number-in-order"],
    ),
    "permutation": (
        lambda r: Samples(order=numpy.roll(numpy.arange(6), r)),
        "samples-differ",
        ["data-rows-moved"],
        ["seed-data", "number-in-order"],
    ),
    "rows": (
        lambda r: Samples(x=torch.arange(12.0).reshape(6, 2).roll(r, 0)),
        "samples-differ",
        ["data-rows-moved"],
        ["seed-data", "number-in-order"],
    ),
    "unseeded": (
        lambda r: Samples(noise=torch.full((3,), float(r))),
        "samples-differ",
        ["data-differ"],
        ["seed-data", "compare-data-files"],
    ),
    "mean": (lambda r: Samples(mean=0.5 + r), "samples-differ", ["data-differ"], ["seed-data", "compare-data-files"]),
    "nothing": (lambda r: Samples(), "samples-differ", ["data-same"], ["sample-from-index"]),
    "generator": (
        lambda r: Samples(noise=numpy.random.default_rng(r)),
        "batch-varies",
        ["data-same", "data-generators"],
        ["seed-sample-generator"],
    ),
    "generator of a transform": (
        lambda r: Samples(transforms=[Transform()]),
        "batch-never-reproduced",
        ["data-same", "data-generators"],
        ["seed-sample-generator"],
    ),
    "clock": (lambda r: Samples(), "batch-varies", ["data-same"], ["sample-from-index"]),
    "files": (
        lambda r: Samples(root=str(Path(__file__))),
        "samples-differ",
        ["data-same", "data-from-files"],
        ["compare-data-files", "sample-from-index"],
    ),
    "workers": (lambda r: Samples(), "samples-random-in-workers", ["data-same"], ["seed-workers"]),
}


def _remedies(code: str, lines: list[Evidence]) -> list[str]:
    data = {"count": 1} if code == "samples-differ" else {}
    verdict = Verdict(False, "batch-differs", "x", evidence=[Evidence.of(code, **data), *lines])
    return [remedy.code for remedy in advise(verdict)]


@pytest.mark.parametrize("kind", KINDS)
def test_held_data_show_where_samples_come_from(kind: str) -> None:
    make, observed, codes, remedies = KINDS[kind]
    lines = compare_held([describe_held(make(replica)) for replica in (0, 1)], 4, 4)
    assert [line.code for line in lines] == codes
    assert _remedies(observed, lines) == remedies


def test_equal_hashes_exclude_hash_order() -> None:
    rows = [describe_held(Samples()) for _ in (0, 1)]
    assert "hashes-differ" not in [line.code for line in compare_held(rows, 4, 4)]
    lines = compare_held([row | {"hash": number} for number, row in enumerate(rows)], 4, 4)
    assert [line.code for line in lines] == ["data-same", "hashes-differ"]
    assert _remedies("samples-differ", lines) == ["stable-hash", "sample-from-index"]


def test_few_samples_were_changed_and_not_drawn() -> None:
    images = [torch.ones(6, 2), torch.ones(6, 2)]
    images[1][3, 0] = 2
    lines = compare_held([describe_held(Samples(x=each)) | {"hash": n} for n, each in enumerate(images)], 1, 4)
    assert [line.code for line in lines] == ["data-differ", "data-few-samples"]
    assert _remedies("samples-differ", lines) == ["compare-data-files"]


def test_short_values_are_shown() -> None:
    (line,) = compare_held([describe_held(_numbered("a", "b")), describe_held(_numbered("b", "a"))], 4, 4)
    assert line.text == (
        "the data sets hold the same names in another order: numbers: {'a': 0, 'b': 1} on replica 0, {'b': 0, 'a': 1} "
        "on replica 1"
    )


def test_order_of_sets_does_not_count() -> None:
    """A set has another order in each process, which changes nothing for a test of membership."""
    assert [line.code for line in compare_held([describe_held(Samples(ignored=set("ab")))] * 2, 4, 4)] == ["data-same"]
    assert "ignored" not in describe_held(Samples(ignored=set("ab")))["values"]


def test_describe_held_ends_in_any_graph() -> None:
    """A data set may hold itself, other objects, big arrays, and objects without attributes."""
    dataset = Samples(objects=[object(), Samples], module=torch.nn.Linear(2, 2), odd=numpy.array([object()]), none=None)
    dataset.itself = dataset
    dataset.many = [Samples() for _ in range(2000)]
    held = describe_held(dataset)
    assert "x" in held["values"]
    assert "odd" not in held["values"]
