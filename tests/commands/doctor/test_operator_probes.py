"""Each probe calls the operator that it is named after, and strict mode stops at those that it must."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dreplica.commands.doctor.operator_probes import PROBES, run_probes, unstopped
from dreplica.diagnosis.decision.documented_ops import DOCUMENTED

_CPU = torch.device("cpu")


class _Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names |= {str(func), str(func).rpartition(".")[0]}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _strict() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("operator", PROBES)
def test_probe_calls_its_operator(operator: str) -> None:
    assert operator in DOCUMENTED
    with _Called() as called:
        output = PROBES[operator](_CPU)
        if output.requires_grad:
            output.sum().backward()
    assert operator in called.names


@pytest.mark.usefixtures("_strict")
def test_probes_in_strict_mode_on_cpu() -> None:
    outcomes = run_probes(_CPU)
    assert {name for name, outcome in outcomes.items() if outcome == "raises"} == {"aten.max_unpool2d", "aten.put_"}
    assert set(outcomes.values()) == {"raises", "runs"}
    assert unstopped(outcomes, "cpu") == []


def test_probes_without_strict_mode_run() -> None:
    assert unstopped(run_probes(_CPU), "cpu") == ["aten.max_unpool2d"]
