"""Tests of sample weights: balanced, or from a CSV file."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data
from dreplica.data.sources.sample_weights import balanced
from dreplica.errors import UsageError
from tests.data.pictures import make_folder


@given(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=50))
def test_balanced_equals_scikit_learn(labels: list[int]) -> None:
    classes = sorted(set(labels))
    expected = dict(zip(classes, compute_class_weight("balanced", classes=numpy.array(classes), y=labels), strict=True))
    weights = balanced(labels)
    assert weights.dtype is torch.float32
    torch.testing.assert_close(weights.double(), torch.tensor([expected[label] for label in labels]).double())


def load(root: Path, **values: Any) -> Any:
    section = {"name": "imagefolder", "root": str(root), "image_size": 32, "val_fraction": 0.25, **values}
    return load_data(DataConfig.model_validate(section))


def test_balanced_counts_only_training_samples(tmp_path: Path) -> None:
    data = load(make_folder(tmp_path), sample_weights="balanced")
    labels = [data.train.source.labels[position] for position in data.train.positions]
    sums: Counter[int] = Counter()
    for label, weight in zip(labels, data.weights.tolist(), strict=True):
        sums[label] += weight
    assert sums[0] == pytest.approx(sums[1]) == pytest.approx(9)


def rows(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.*"))]


def test_csv_gives_each_file_its_weight(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    names = rows(root)
    table = tmp_path / "weights.csv"
    lines = [f"{name},{number / 8}" for number, name in enumerate(names)]
    table.write_text("\ufefffile, weight\r\n" + "\r\n".join(reversed(lines)) + "\r\n", encoding="utf-8")
    data = load(root, sample_weights=str(table))
    assert data.weights.tolist() == [names.index(data.train.describe(index)) / 8 for index in range(18)]
    # A validation sample needs no weight.
    first_val = data.val.describe(0)
    table.write_text("\n".join(["file,weight", *(line for line in lines if not line.startswith(f"{first_val},"))]))
    assert load(root, sample_weights=str(table)).weights.equal(data.weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [*lines[:5], "china/none.jpg,1", *lines[5:]], "line 6: data.root has no image 'china/none.jpg'"),
        (lambda lines: [*lines, "flower/more/00.jpg,1"], "Did you mean 'flower/00.jpg'?"),
        (lambda lines: ["weight,file", *lines[1:]], "line 1: expected the columns file,weight"),
        (lambda lines: [], "line 1: expected the columns"),
        (lambda lines: [*lines, lines[3]], "line 26: 'china/02.jpg' already has a weight in line 4"),
        (lambda lines: [*lines[:2], "china/01.jpeg,nan", *lines[3:]], "line 3: 'china/01.jpeg' has the weight 'nan'"),
        (lambda lines: [*lines[:2], "china/01.jpeg,-1", *lines[3:]], "line 3: 'china/01.jpeg' has the weight '-1'"),
        (lambda lines: [*lines[:2], "china/01.jpeg,inf", *lines[3:]], "has the weight 'inf'"),
        (lambda lines: [*lines[:2], "china/01.jpeg,1e39", *lines[3:]], "has the weight '1e39'"),
        (lambda lines: [*lines[:2], "china/01.jpeg,one", *lines[3:]], "has the weight 'one'"),
        (lambda lines: [*lines[:2], "china/01.jpeg", *lines[3:]], "line 3: expected 2 columns, got 1"),
        (lambda lines: lines[:1], "has no weight for '"),
        (lambda lines: [lines[0], *(line[:-1] + "0" for line in lines[1:])], "all weights are 0"),
        (lambda lines: [lines[0], *(line + "e-60" for line in lines[1:])], "all weights are 0"),  # as float32
    ],
)
def test_invalid_csv_is_a_usage_error(change: Any, words: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    table = tmp_path / "weights.csv"
    table.write_text("\n".join(change(["file,weight", *(f"{name},1" for name in rows(root))])))
    with pytest.raises(UsageError) as caught:
        load(root, sample_weights=str(table))
    assert str(caught.value).startswith(f"data.sample_weights: '{table}'")
    assert words in str(caught.value)


def test_missing_or_binary_csv_is_a_usage_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 4)
    with pytest.raises(UsageError, match="does not exist"):
        load(root, sample_weights="balance.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="cannot be read as CSV"):
        load(root, sample_weights=str(tmp_path / "a.csv"))


def test_weights_of_other_data_sets() -> None:
    assert load_data(DataConfig.model_validate({"sample_weights": "balanced"})).weights is not None
    own = {"name": "tests.fixtures:tiny_images", "sample_weights": "balanced"}
    assert load_data(DataConfig.model_validate(own)).weights.tolist() == [1.0] * 80  # type: ignore[union-attr]
    with pytest.raises(
        UsageError, match=r"^data.sample_weights: 'a.csv' is a CSV file, but the samples of 'digits' are not in files"
    ):
        load_data(DataConfig.model_validate({"sample_weights": "a.csv"}))
    unlabelled = {"name": f"{__name__}:without_labels", "sample_weights": "balanced"}
    with pytest.raises(UsageError, match="Add an attribute `labels` or `targets`"):
        load_data(DataConfig.model_validate(unlabelled))


def without_labels(_config: DataConfig) -> Any:
    pairs = [(torch.zeros(3), 0)]
    return pairs, pairs, 2
