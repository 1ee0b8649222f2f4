"""Tests that the examples cover the installed torch's documentation and run their operators."""

from collections.abc import Callable, Iterator

import pytest
import torch

from dreplica.config.schema import DeterminismConfig
from dreplica.diagnosis.decision.documented_ops import DOCUMENTED
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.environment.determinism import apply_determinism
from tests.benchmarks import nondeterministic_operators as benchmark
from tests.benchmarks.documented_operators import CASES, Case, Work, read_documentation
from tests.benchmarks.nondeterministic_operators import Row, as_markdown, documented_as, run_case

CPU = torch.device("cpu")
DIFFERENT_ON_CPU = {"LSTM"}
"""Cases whose operator exists only on CUDA."""


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    threads, default = torch.get_num_threads(), DeterminismConfig(mode="off")
    yield
    apply_determinism(default.model_copy(update={"threads": threads}))


def test_every_documented_operator_has_an_example() -> None:
    """An operator that a new release of torch documents fails here until an example is added."""
    entries = read_documentation(torch.use_deterministic_algorithms.__doc__ or "")
    documented = {name for entry in entries if not entry.elsewhere for name in entry.names}
    assert documented - {case.documented for case in CASES} == set()
    assert len(documented) > 35
    assert [case.name for case in CASES if f"aten.{case.operator}" not in DOCUMENTED] == []
    assert len({case.name for case in CASES}) == len(CASES)


def test_documentation_is_read_with_both_lists() -> None:
    text = """The following will act deterministically when ``mode=True``:

        * :func:`torch.bmm` when called on sparse-dense CUDA tensors
        * :func:`torch.Tensor.index_put` with ``accumulate=True`` when called on a CPU
          tensor

    The following normally-nondeterministic operations will throw a :class:`RuntimeError`:

        * :func:`torch.nn.MaxPool2d`, and :func:`torch.nn.AvgPool3d`
          when attempting to differentiate an MPS tensor
        * :func:`torch.nn.functional.interpolate` on CUDA, of these modes:

          - ``linear``

    In addition, :func:`torch.empty` is filled.
    """
    entries = read_documentation(text)
    assert [(entry.names, entry.raises, entry.elsewhere) for entry in entries] == [
        (("torch.bmm",), False, False),
        (("torch.Tensor.index_put",), False, False),
        (("torch.nn.MaxPool2d", "torch.nn.AvgPool3d"), True, True),
        (("torch.nn.functional.interpolate",), True, False),
    ]
    assert entries[1].text.endswith("when called on a CPU tensor")
    with pytest.raises(ValueError, match="two lists"):
        read_documentation("There is nothing to say.")


@pytest.mark.parametrize("case", [case for case in CASES if "cpu" in case.devices], ids=lambda case: case.name)
def test_example_runs_its_operator(case: Case) -> None:
    work = case.make(CPU, 256)
    with OpTracer() as tracer:
        work()
    names = {record.name for record in tracer.records}
    assert bool(names & benchmark._names(case)) == (case.name not in DIFFERENT_ON_CPU), names


def row_of(make: Callable[[torch.device, int], Work], operator: str = "index_add") -> Row:
    return run_case(Case("mine", None, operator, make), CPU, repeats=3)


def test_repeatable_operator_does_not_differ() -> None:
    assert row_of(lambda device, size: lambda: torch.ones(2) + 1).differs == "no"


def test_unexpected_varying_operator_is_wrong() -> None:
    """On the CPU no operator of the table varies, so random numbers serve as an example."""
    row = row_of(lambda device, size: lambda: torch.rand(2))
    assert (row.differs, row.found, row.is_wrong) == ("yes", "aten.rand.default", True)
    page = as_markdown([row], "Title.")
    assert "| mine | elsewhere | no | yes | `aten.rand.default` |" in page


def test_failing_case_becomes_a_row() -> None:
    row = row_of(lambda device, size: lambda: torch.ones(2) @ torch.ones(3))
    assert row.is_wrong
    assert row.differs.startswith("fails: inconsistent tensor size")


def test_row_says_that_strict_mode_raises() -> None:
    (case,) = [case for case in CASES if case.name == "put_"]
    row = run_case(case, CPU, repeats=2)
    assert (row.documented, row.raises) == (documented_as(case), "yes")
    assert "raises" in row.documented
