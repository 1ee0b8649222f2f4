"""Whole jobs in which code runs once on replica 1: the cause is never hardware, and code where it left a trace."""

import pytest

from tests.fixtures import SMALL
from tests.harness import run_job
from tests.messages import codes, data_of

CODE = "tests.diagnosis.decision.one_time_code"


@pytest.mark.parametrize(
    ("name", "cause", "code"),
    [
        ("clamp", "unreplayed-state", "original-step-wrote"),
        ("monitoring", "unreplayed-state", "original-step-counted"),
        ("draw", "generators-differ", "original-step-drew"),
        ("draw_of_python", "generators-differ", "original-step-drew"),
        ("skipped_step", "unreplayed-state", "original-step-skipped"),
        ("scaled_inputs", "unexplained", "original-elements-differ"),
    ],
)
@pytest.mark.process
def test_code_that_runs_once_is_not_hardware(name: str, cause: str, code: str) -> None:
    kind = "replica.factory" if name == "skipped_step" else "model.factory"
    job = run_job(*SMALL, f"--{kind}={CODE}:{name}", "--train.epochs=1", num_replicas=2)
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["suspects"], verdict["step"]) == (cause, [1], 3)
    assert code in codes(verdict["evidence"])
    assert data_of(verdict["evidence"], code)["replica"] == 1
