"""What is decided before replicas meet."""

from collections.abc import Callable

import pytest
import torch

from dreplica.environment.device import Device
from dreplica.errors import ExitCode
from dreplica.run import bootstrap
from dreplica.run.bootstrap import Prepared, start_replica

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture
def on_a(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has this process find itself on such a device, with CUDA started before."""

    def place(device: str) -> None:
        for name in ("RANK", WORKSPACE):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(bootstrap, "bind_device", lambda _: Device(torch.device(device)))
        monkeypatch.setattr(bootstrap, "apply_determinism", lambda _: None)

    return place


def run(*argv: str) -> tuple[ExitCode, list[Prepared]]:
    seen: list[Prepared] = []

    def conduct(prepared: Prepared, *_: object) -> ExitCode:
        seen.append(prepared)
        return ExitCode.AGREED

    return start_replica(argv, conduct), seen


def test_strict_mode_refuses_gpu_that_may_be_nondeterministic(
    on_a: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on_a("cuda:0")
    assert run() == (ExitCode.UNUSABLE, [])
    error = capsys.readouterr().err
    assert error.startswith("error: CUBLAS_WORKSPACE_CONFIG is not set, and an imported module has started")
    assert "Export CUBLAS_WORKSPACE_CONFIG=:4096:8" in error


def test_warn_mode_warns_and_puts_it_into_the_report(
    on_a: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on_a("cuda:0")
    code, (prepared,) = run("--determinism.mode", "warn")
    assert code == ExitCode.AGREED
    (warning,) = prepared.warnings
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize(("device", "mode"), [("cuda:0", "off"), ("cpu", "strict"), ("cpu", "warn")])
def test_otherwise_it_does_not_matter(on_a: Callable[[str], None], device: str, mode: str) -> None:
    on_a(device)
    code, (prepared,) = run("--determinism.mode", mode)
    assert (code, prepared.warnings) == (ExitCode.AGREED, [])
