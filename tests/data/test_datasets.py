"""Tests of loading data sets by name. Each source has a test file of its name in `sources/`."""

import pytest

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import _describe_skipped, load_data
from dreplica.errors import UsageError


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "data.name: there is no data set 'digit'. Did you mean 'digits'?"),
        ("cifar", "data.name: there is no data set 'cifar'."),
    ],
)
def test_unknown_data_set_error_suggests_the_nearest(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_data(DataConfig(name=name))
    assert caught.value.code == "unknown-data-set"
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("count", "first", "last"),
    [
        (1, "skipped 1 sample:", "file 0"),
        (10, "skipped 10 samples:", "file 9"),
        (1000, "skipped 1000 samples:", "990 more, which report.json lists"),
    ],
)
def test_long_list_of_skipped_samples_is_shortened(count: int, first: str, last: str) -> None:
    lines = _describe_skipped([f"file {number}" for number in range(count)]).split("\n  ")
    assert (lines[0], lines[-1]) == (first, last)
    assert len(lines) <= 12
