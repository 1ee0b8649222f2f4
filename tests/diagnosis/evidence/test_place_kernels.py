"""Code in place of torch's own that divides the replicas as their results do."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dreplica.diagnosis.evidence.finding import Kind
from dreplica.diagnosis.evidence.observation import OpDifference
from dreplica.diagnosis.evidence.place_kernels import kernels_at
from dreplica.diagnosis.tracing.foreign_code import Foreign, collect_foreign
from dreplica.diagnosis.tracing.op_tracer import OpRecord

MODEL = nn.Sequential(nn.Linear(2, 2))
PLAIN = collect_foreign(MODEL)
ADDMM = OpRecord("aten.addmm.default", "0", "forward", b"i", b"o", f"{__file__}:1")
PLACE = OpDifference(0, ADDMM, replace(ADDMM, outputs=b"x"))


@pytest.fixture
def registered() -> Iterator[Foreign]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm", lambda bias, a, b, *, beta=1, alpha=1: bias, "CPU")
    yield collect_foreign(MODEL)
    library._destroy()


def found(place: OpDifference, *rows: Foreign, groups: Any = ([0], [1])) -> list[str]:
    witnesses: Any = [SimpleNamespace(foreign=row) for row in rows]
    findings = kernels_at(place, witnesses, groups)
    assert all(finding.kind is Kind.KERNELS_DIVIDE for finding in findings)
    return [line.text for finding in findings for line in finding.lines]


def test_registered_kernel_is_named_with_its_file(registered: Foreign) -> None:
    (line,) = found(PLACE, PLAIN, registered)
    assert line.startswith("kernels of aten.addmm.default: as in torch on replica 0; CPU from ")
    assert __file__ in line


def test_kernel_on_all_replicas_does_not_divide(registered: Foreign) -> None:
    assert found(PLACE, registered, registered) == []


def test_kernel_must_divide_as_the_results_do(registered: Foreign) -> None:
    assert found(PLACE, PLAIN, registered, registered, groups=([0, 1], [2])) == []
    assert len(found(PLACE, PLAIN, PLAIN, registered, groups=([0, 1], [2]))) == 1


def test_kernel_of_another_operator_is_not_named(registered: Foreign) -> None:
    one = replace(ADDMM, name="aten.mm.default")
    assert found(OpDifference(0, one, replace(one, outputs=b"x")), PLAIN, registered) == []


def test_replaced_function_is_named_where_it_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def relu(x: Tensor, inplace: bool = False) -> Tensor:
        return x.clamp(min=1e-6)

    monkeypatch.setattr(F, "relu", relu)
    line = relu.__code__.co_firstlineno + 1
    clamp = replace(ADDMM, name="aten.clamp.default", source=f"{__file__}:{line}")
    replaced = collect_foreign(MODEL)
    assert found(OpDifference(0, ADDMM, clamp), PLAIN, replaced)[0].startswith(
        "the function torch.nn.functional.relu: "
    )
    elsewhere = replace(clamp, source=f"{__file__}:{line + 50}")
    assert found(OpDifference(0, ADDMM, elsewhere), PLAIN, replaced) == []


def test_replaced_method_and_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "relu", lambda self: self)
    assert "the function torch.Tensor.relu" in collect_foreign(MODEL).code.keys() - PLAIN.code.keys()
    monkeypatch.setitem(vars(MODEL[0]), "forward", lambda x: x)
    assert "the function 0.forward" in collect_foreign(MODEL).code


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_active_mode_is_named() -> None:
    with _Mode():
        active = collect_foreign(MODEL)
    (line,) = found(PLACE, PLAIN, active)
    assert line.startswith("the active mode _Mode: as in torch on replica 0")
