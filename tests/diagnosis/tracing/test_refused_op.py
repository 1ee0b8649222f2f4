"""The operator that strict mode does not let run."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dreplica.diagnosis.tracing.refused_op import Raised, find_refused, is_refusal


@pytest.fixture
def strict() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Put(nn.Module):
    """Writes to places, which has a deterministic implementation only where it accumulates."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.put(torch.tensor([0, 0]), torch.ones(2))


def test_find_refused_names_module_and_phase(strict: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Put())
    with pytest.raises(RuntimeError) as raised:
        model(torch.ones(2, 4))
    assert is_refusal(raised.value)
    found = find_refused(lambda: model(torch.ones(2, 4)), None, model)
    assert found == Raised("aten.put.default", "1", "forward")


def test_find_refused_without_refusal(strict: None) -> None:
    model = nn.Linear(4, 4)
    assert find_refused(lambda: model(torch.ones(2, 4)), None, model) is None


def test_find_refused_reraises_other_errors(strict: None) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        find_refused(lambda: model(torch.ones(2, 5)), None, model)
    assert not is_refusal(raised.value)
