"""The examples are those of the installed torch's documentation, and run what they say."""

from collections.abc import Callable, Iterator

import pytest
import torch

from dreplica.config.schema import DeterminismConfig
from dreplica.diagnosis.decision.nondeterministic_ops import DOCUMENTED
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.environment.determinism import apply_determinism
from tests.benchmarks import nondeterministic_operators as benchmark
from tests.benchmarks.documented_operators import CASES, Case, Work, read_documentation
from tests.benchmarks.nondeterministic_operators import Row, as_markdown, documented_as, look_at

CPU = torch.device("cpu")
OTHERWISE_ON_CPU = {"LSTM"}
"""Cases of operators that only CUDA has."""


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    threads, default = torch.get_num_threads(), DeterminismConfig(mode="off")
    yield
    apply_determinism(default.model_copy(update={"threads": threads}))


def test_every_documented_operator_has_an_example_and_stands_in_the_table() -> None:
    """Of this release, whichever it is: one that torch adds is missing here until somebody has looked at it."""
    entries = read_documentation(torch.use_deterministic_algorithms.__doc__ or "")
    documented = {name for entry in entries if not entry.elsewhere for name in entry.names}
    assert documented - {case.documented for case in CASES} == set()
    assert len(documented) > 35
    assert [case.name for case in CASES if f"aten.{case.operator}" not in DOCUMENTED] == []
    assert len({case.name for case in CASES}) == len(CASES)


def test_documentation_is_read_with_conditions_and_both_lists() -> None:
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
def test_an_example_runs_its_operator(case: Case) -> None:
    work = case.make(CPU, 256)
    with OpTracer() as tracer:
        work()
    names = {record.name for record in tracer.records}
    assert bool(names & benchmark._names(case)) == (case.name not in OTHERWISE_ON_CPU), names


def row_of(make: Callable[[torch.device, int], Work], operator: str = "index_add") -> Row:
    return look_at(Case("mine", None, operator, make), CPU, repeats=3)


def test_what_repeats_does_not_differ() -> None:
    assert row_of(lambda device, size: lambda: torch.ones(2) + 1).differs == "no"


def test_what_varies_is_found_and_one_that_is_not_expected_is_wrong() -> None:
    """On the CPU, no operator of the table varies by itself."""
    row = row_of(lambda device, size: lambda: torch.rand(2))
    assert (row.differs, row.found, row.is_wrong) == ("yes", "aten.rand.default", True)
    page = as_markdown([row], "Title.")
    assert "| mine | elsewhere | no | yes | `aten.rand.default` |" in page


def test_a_case_that_fails_takes_nothing_from_the_others() -> None:
    row = row_of(lambda device, size: lambda: torch.ones(2) @ torch.ones(3))
    assert row.is_wrong
    assert row.differs.startswith("fails: inconsistent tensor size")


def test_strict_mode_is_seen_to_raise() -> None:
    (case,) = [case for case in CASES if case.name == "put_"]
    row = look_at(case, CPU, repeats=2)
    assert (row.documented, row.raises) == (documented_as(case), "yes")
    assert "raises" in row.documented
