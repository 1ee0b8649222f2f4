"""Arguments of `Agreement` that are invalid or would silently compare nothing are rejected."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.hasher import Hasher
from dreplica.agreement.trace.reader import Trace
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
        *(
            (
                {"timeout": seconds},
                f"timeout must be above 0 and at most 1e9 seconds, got {seconds!r}. Pass for example timeout=300.",
            )
            for seconds in (0, -1.0, float("inf"), float("nan"), 1e300, "5")
        ),
        *(
            (
                {"steps_done": steps},
                f"steps_done must be a number of steps from 0, got {steps!r}. Pass it as an int, or omit it.",
            )
            for steps in (-1, 1.5, "5", None, True, 2**70)
        ),
        (
            {"record": "a\0b"},
            "record must be the path of a run folder, got 'a\\x00b', which has a null byte. Pass record='runs/a'.",
        ),
        ({"trace": "x"}, "trace must be a TraceWriter or None, got str. It is internal: omit it."),
    ],
)
def test_agreement_rejects_invalid_arguments(arguments: Any, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        Agreement(nn.Linear(2, 2), **arguments)
    assert str(raised.value) == text
    assert raised.value.code == "invalid-argument"
    assert raised.value.fields["argument"] in arguments


@pytest.mark.parametrize("epoch", [0.5, -1, True, "one", float("nan"), 2**70, torch.tensor(1)])
@pytest.mark.parametrize("method", ["step", "evaluation"])
def test_agreement_rejects_invalid_epochs(method: str, epoch: Any, tmp_path: Path) -> None:
    with Agreement(nn.Linear(2, 2), record=tmp_path / "a") as agreement:
        arguments = {"predictions": {"a": torch.ones(1)}} if method == "evaluation" else {}
        with pytest.raises(UsageError, match=r"epoch must be an int from 0 or None, got .* Pass for example"):
            getattr(agreement, method)(epoch=epoch, **arguments)
    assert [line.key for line in Trace(tmp_path / "a").lines()] == [(0, False)]


def test_agreement_rejects_unknown_keywords() -> None:
    with pytest.raises(TypeError, match=r"Agreement\(\) got an unexpected keyword argument 'evry'"):
        Agreement(nn.Linear(2, 2), evry=2)  # type: ignore[call-arg]


def test_agreement_rejects_trace_of_other_algorithm() -> None:
    with pytest.raises(UsageError, match=r"algorithm=hasher\.algorithm") as raised:
        Agreement(nn.Linear(2, 2), trace=TraceWriter(None, 1, algorithm="other/1"), hasher=Hasher())
    assert raised.value.fields == {"argument": "trace", "value": "other/1"}
