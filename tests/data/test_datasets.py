"""Tests of loading data sets by name. Each source has a test file of its name in `sources/`."""

import pytest

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data
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
