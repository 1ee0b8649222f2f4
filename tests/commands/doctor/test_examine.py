"""The command: its processes, its output, and both exit codes."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from dreplica.commands.doctor.check import Check
from dreplica.commands.doctor.examine import Examination, examine, run_doctor
from dreplica.commands.main import main
from dreplica.errors import ExitCode
from tests.harness import REPOSITORY

pytestmark = pytest.mark.process

_KEYS = {"name", "status", "seen", "why", "remedy"}


def test_strict_mode_holds_here(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"schema", "strict_holds", "checks", "manifest"}
    assert found["manifest"]["packages"]["torch"] == torch.__version__
    assert all(set(check) == _KEYS for check in found["checks"])
    checks = {check["name"]: check for check in found["checks"]}
    assert len(checks) == len(found["checks"])
    for name in ("strict mode", "self-test on cpu", "operators on cpu", "gloo"):
        assert checks[name]["status"] == "ok", checks[name]
    assert all(check["remedy"] for check in found["checks"] if check["status"] in {"warn", "bad"})
    assert found["strict_holds"] == all(check["status"] != "bad" for check in found["checks"])
    page = (REPOSITORY / "docs" / "doctor.md").read_text()
    assert all(f"| {check['name'].removesuffix(' on cpu')} |" in page for check in found["checks"])
    assert code == (ExitCode.AGREED if found["strict_holds"] else ExitCode.FAILED)


def test_doctor_reports_a_broken_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sitecustomize module prints and disables seeding, and gloo gets a device that does not exist."""
    (tmp_path / "sitecustomize.py").write_text(
        "print('hello', flush=True)\nimport torch\ntorch.manual_seed = lambda seed: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    monkeypatch.setenv("OMP_DYNAMIC", "true")  # a backward pass on several threads may hang with it
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert main(["doctor"]) == ExitCode.FAILED
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("bad      self-test on cpu") and "diverge at step 1, buffers" in line for line in lines)
    assert any(line.startswith("bad      gloo") and "nosuch0" in line for line in lines)
    assert lines[-1].startswith("strict mode does not hold on this machine: ")


def test_examine_reports_processes_that_fail_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = examine()
    assert not found.strict_holds
    assert found.checks[-1].seen == "a process failed: exit code 1, without output"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("unknown", 0), ("bad", 1)])
def test_exit_code_depends_only_on_bad(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = Check("a thing", status, "a [value]", "a reason", ("a remedy [x]",))  # type: ignore[arg-type]
    monkeypatch.setattr("dreplica.commands.doctor.examine.examine", lambda: Examination([check], {}))
    assert run_doctor() == code
    printed = capsys.readouterr().out
    assert "a [value]" in printed
    assert ("remedy: a remedy [x]" in printed) == (status in {"warn", "bad"})
