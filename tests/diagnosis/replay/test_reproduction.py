"""Comparison of a replay with the original step, whose tensors are partly unknown."""

from types import SimpleNamespace
from typing import Any

import torch

from dreplica.diagnosis.evidence.aftermath import Aftermath
from dreplica.diagnosis.evidence.finding import Kind
from dreplica.diagnosis.replay.reproduction import Reproduction, examine
from dreplica.state.stages import Stage


def kinds(output: bool | None, generator: torch.Tensor) -> list[Kind]:
    """Findings on a step whose gradients are not reproduced, with this state of torch's generator after it."""
    drawn = torch.Generator().manual_seed(1)
    replayed = Aftermath({}, generators={"torch.cpu": drawn.get_state()})
    happened = Aftermath({}, generators={"torch.cpu": generator})
    rows = {"output": Reproduction(b"o", output), "gradients": Reproduction(b"g", reproduced=False)}
    original: Any = SimpleNamespace(stages={name: Stage((), b"") for name in rows})
    return [each.kind for each in examine(original, {}, rows, "output", (happened, replayed, replayed), 0)]


def test_examine_finds_draws_where_output_is_unknown() -> None:
    generator = torch.Generator().manual_seed(1)
    assert kinds(None, generator.get_state()) == []
    torch.rand(3, generator=generator)
    assert kinds(None, generator.get_state()) == [Kind.DRAWN_FURTHER]
    assert kinds(True, generator.get_state()) == [], "the output is reproduced, so this is another divergence"
