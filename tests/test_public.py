"""The public surface: exported names, their docstrings, and the cost of `import dreplica`."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import dreplica
from dreplica.config.paths import PACKAGE_ROOT
from dreplica.errors import DreplicaError

NAMES = {
    "Agreement",
    "Divergence",
    "DreplicaError",
    "Replica",
    "ReplicaLost",
    "Trace",
    "Verdict",
    "WiringError",
    "__version__",
    "check_wiring",
    "diagnose",
    "fingerprint",
}
CALLABLES = {
    "Agreement": dreplica.Agreement,
    "Agreement.step": dreplica.Agreement.step,
    "Agreement.evaluation": dreplica.Agreement.evaluation,
    "Trace": dreplica.Trace,
    "check_wiring": dreplica.check_wiring,
    "diagnose": dreplica.diagnose,
    "fingerprint": dreplica.fingerprint,
}
RETURNS = ("Agreement.step", "diagnose", "fingerprint")
RAISES = ("Agreement", "Agreement.step", "Trace", "check_wiring", "diagnose", "fingerprint")


def test_exported_names() -> None:
    assert set(dreplica.__all__) == NAMES
    assert set(dir(dreplica)) >= NAMES
    for name in NAMES:
        assert getattr(dreplica, name) is not None
    with pytest.raises(AttributeError, match="Hasher"):
        dreplica.Hasher  # noqa: B018


@pytest.mark.parametrize("name", ["Divergence", "ReplicaLost", "WiringError"])
def test_exceptions_share_a_base_class(name: str) -> None:
    assert issubclass(getattr(dreplica, name), DreplicaError)


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_public_names_have_a_docstring(name: str) -> None:
    value = getattr(dreplica, name)
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")  # the one that @dataclass generates


@pytest.mark.parametrize("name", CALLABLES)
def test_public_callables_document_their_interface(name: str) -> None:
    value: Callable[..., Any] = CALLABLES[name]
    text = inspect.getdoc(value)
    assert text is not None
    described = text.partition("\nArgs:\n")[2]
    for argument, parameter in inspect.signature(value).parameters.items():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        assert argument == "self" or f"    {stars}{argument}: " in described, argument
    assert ("\nReturns:\n" in text) or name not in RETURNS
    assert ("\nRaises:\n" in text) or name not in RAISES


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, dreplica; dreplica.Trace, dreplica.Verdict, dreplica.DreplicaError; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_package_is_typed() -> None:
    assert (PACKAGE_ROOT / "py.typed").is_file()
