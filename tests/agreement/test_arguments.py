"""Arguments of `Agreement` that are invalid or would silently compare nothing are rejected."""

from typing import Any

import pytest
from torch import nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.hasher import Hasher
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.errors import UsageError


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"expect": "Identical"},
            "expect must be 'identical', 'independent' or 'ddp', got 'Identical'. Did you mean 'identical'?",
        ),
        ({"on_divergence": "raise"}, "on_divergence must be 'stop' or 'continue', got 'raise'."),
        ({"lag": 5}, "lag must be 0 or 1, got 5."),
        ({"every": -1}, "every must be >= 0, got -1. Use 0 to disable comparisons."),
        (
            {"every": 1.5},
            "every must be an integer, got 1.5. Pass a number of steps, or 0 to disable comparisons.",
        ),
        ({"stages": ["weight"]}, "stages: 'weight' is not a stage. Did you mean 'weights'?"),
        ({"stages": ("gradient",)}, "stages: 'gradient' is not a stage. Did you mean 'gradients'?"),
        (
            {"expect": "independent", "stages": ["weights"]},
            "stages: 'weights' is not compared with expect='independent', only indices, batch. Remove it, or use "
            "expect='identical' with the stages that must agree.",
        ),
        (
            {"stages": []},
            "stages must name at least one stage, got []. Omit it to compare every stage that must agree.",
        ),
        ({"stages": "weights"}, "stages must be a list of stage names, got 'weights'. Use stages=['weights']."),
        ({"trace": "x"}, "trace must be a TraceWriter or None, got str. It is internal: omit it."),
    ],
)
def test_agreement_rejects_invalid_arguments(arguments: Any, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        Agreement(nn.Linear(2, 2), **arguments)
    assert str(raised.value) == text
    assert raised.value.code == "invalid-argument"
    assert raised.value.fields["argument"] in arguments


def test_agreement_rejects_unknown_keywords() -> None:
    with pytest.raises(TypeError, match=r"Agreement\(\) got an unexpected keyword argument 'evry'"):
        Agreement(nn.Linear(2, 2), evry=2)  # type: ignore[call-arg]


def test_agreement_rejects_trace_of_other_algorithm() -> None:
    with pytest.raises(UsageError, match=r"algorithm=hasher\.algorithm") as raised:
        Agreement(nn.Linear(2, 2), trace=TraceWriter(None, 1, algorithm="other/1"), hasher=Hasher())
    assert raised.value.fields == {"argument": "trace", "value": "other/1"}
