"""Tests of the split into training and validation samples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreplica.data.sources.split import split_indices
from dreplica.errors import UsageError


@given(st.integers(2, 500), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_assigns_each_sample_to_one_part(num_samples: int, fraction: float, seed: int) -> None:
    num_val = round(num_samples * fraction)
    if not 0 < num_val < num_samples:
        with pytest.raises(UsageError, match=r"^data\.val_fraction: "):
            split_indices(num_samples, fraction, seed)
        return
    train, val = split_indices(num_samples, fraction, seed)
    assert len(val) == num_val
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(num_samples))
    assert split_indices(num_samples, fraction, seed)[1].equal(val)
