"""The line that `finish` logs."""

import logging
import subprocess
import sys

import pytest

from dreplica.agreement.coverage import describe_coverage
from dreplica.agreement.result import describe_result
from dreplica.agreement.trace.report_records import ReferenceCoverage
from tests.agreement.own_loop import train

SEEN = {"batch", "weights"}


@pytest.mark.parametrize(
    ("ranks", "every", "checked", "taken", "equal", "recorded", "line"),
    [
        (2, 1, 10, 10, None, None, "AGREED 2 ranks, 10 steps: batch, weights"),
        (2, 1, 1, 1, None, None, "AGREED 2 ranks, 1 step: batch, weights"),
        (2, 5, 2, 10, None, None, "AGREED 2 ranks, 2 of 10 steps: batch, weights"),
        (2, 1, 0, 0, None, None, "AGREED 2 ranks, the build: batch, weights"),
        (3, 1, 1000, 1000, 900, None, "AGREED 3 ranks and with runs/a, 900 of 1,000 steps: batch, weights"),
        (1, 1, 10, 10, 10, "runs/b", "AGREED with runs/a, 10 steps: batch, weights; recorded in runs/b"),
        (1, 1, 10, 10, None, "runs/b", "RECORDED 10 steps in runs/b: batch, weights"),
        (1, 1, 10, 10, 0, "runs/b", "RECORDED 10 steps in runs/b: batch, weights; runs/a has none of these steps"),
        (1, 1, 10, 10, None, None, "NOT COMPARED 10 steps: this process is alone. Pass record="),
    ],
)
def test_result_says_what_was_compared(
    ranks: int, every: int, checked: int, taken: int, equal: int | None, recorded: str | None, line: str
) -> None:
    reference = None if equal is None else ReferenceCoverage(run="runs/a", steps=equal)
    coverage = describe_coverage(ranks, "identical", every, checked, reference, SEEN)
    assert describe_result(coverage, taken, checked, SEEN, recorded).startswith(line)


def test_result_of_several_ranks_without_comparison() -> None:
    coverage = describe_coverage(2, "independent", 0, 0, None, set())
    assert describe_result(coverage, 10, 0, set(), None) == "NOT COMPARED 0 of 10 steps"


def test_one_process_is_never_agreed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dreplica"):
        verdict = train().finish()
    assert not verdict.agreed
    assert verdict.summary in caplog.messages
    assert verdict.summary.startswith("NOT COMPARED 5 steps: this process is alone")


@pytest.mark.process
def test_line_is_printed_once_if_logging_is_configured_late() -> None:
    code = (
        "import logging; from tests.agreement.own_loop import train; agreement = train(); "
        "logging.basicConfig(level=logging.INFO); agreement.finish()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.count("NOT COMPARED") == 1
    assert done.stderr.startswith("INFO:dreplica.")


@pytest.mark.process
@pytest.mark.parametrize("configured", [False, True])
def test_line_is_printed_unless_logging_is_configured(configured: bool) -> None:
    code = "from tests.agreement.own_loop import train; train().finish()"
    if configured:
        code = f"import logging; logging.basicConfig(level=logging.ERROR); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr.startswith("dreplica: NOT COMPARED") != configured
