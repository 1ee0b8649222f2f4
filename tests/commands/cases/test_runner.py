"""`dreplica cases`: real jobs, and what is said of them."""

import json
import os
import re
from pathlib import Path

import pytest

from dreplica.agreement.trace.report_records import EpochRecord
from dreplica.agreement.trace.run_report import RunReport
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.commands import main as cli
from dreplica.commands.cases import runner
from dreplica.commands.cases.case import Case, read_case
from dreplica.commands.cases.runner import run_case
from dreplica.state.fingerprint.stage import Stage


@pytest.mark.process
@pytest.mark.cluster
def test_two_cases_as_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = tmp_path / "kept"
    assert cli.main(["cases", "clean", "deepcopied_optimizer", "--json", "--keep", str(keep)]) == 0
    clean, deepcopied = json.loads(capsys.readouterr().out)
    assert clean["case"] == "clean"
    assert clean["as_expected"] is True
    assert clean["found"]["cause"] == "none"
    assert clean["found"]["val_accuracy"] == "equal"
    assert deepcopied["found"]["cause"] == "optimizer-not-bound"
    assert deepcopied["found"]["suspects"] == [0, 1]
    for name in ("clean", "deepcopied_optimizer"):
        assert (keep / name / "report.json").is_file()
    assert cli.main(["cases", "clean", "--keep", str(keep)]) == 2
    assert "is not empty. Use a new or empty folder." in capsys.readouterr().err


@pytest.mark.process
def test_a_case_that_comes_out_otherwise_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(
        "# Expected: not-learning step=0\n"
        'model: {factory: "dreplica.commands.cases.samples.models:tiny_cnn"}\n'
        'data: {name: "dreplica.commands.cases.samples.data:tiny_images"}\n'
    )
    monkeypatch.setattr(runner, "find_cases", lambda names: [read_case(tmp_path / "wrong.yaml")])
    assert cli.main(["cases"]) == 1
    out = capsys.readouterr().out
    assert "wrong: cause should be 'not-learning', is 'none'" in out
    assert "wrong: step should be 0, is None" in out
    assert "1 of 1 case not as expected" in out


@pytest.mark.process
def test_run_without_report_is_a_mismatch_with_its_output(tmp_path: Path) -> None:
    path = tmp_path / "unusable.yaml"
    path.write_text("# Expected: none\nmodell: {}\n")
    result = run_case(Case("unusable", path, {"cause": "none"}, num_replicas=1), tmp_path / "runs")
    assert result.mismatches == ["cause"]
    assert "it ended without a report" in result.problem
    assert "Did you mean 'model'" in result.problem


@pytest.mark.process
@pytest.mark.cluster
def test_a_run_that_does_not_end_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "endless.yaml"
    path.write_text("run: {name: endless}\n")
    case = Case("endless", path, {"cause": "none"}, num_replicas=1, module="tests.commands.cases.endless")
    result = run_case(case, tmp_path / "runs", timeout=12)
    assert result.mismatches == ["cause"]
    assert "did not end within 12 seconds" in result.problem
    (process_id,) = re.findall(r"process (\d+) waits for ever", result.problem)
    with pytest.raises(ProcessLookupError):
        os.kill(int(process_id), 0)


def test_unknown_names_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cases", "cleen"]) == 2
    assert "Did you mean 'clean'" in capsys.readouterr().err
    assert cli.main(["cases", "clean", "--train.epochs=2"]) == 2
    assert "--train.epochs=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("accuracies", "weights", "expected"),
    [
        ([[0.5, 0.5], [1.0, 1.0]], ["a", "b"], ("equal", "unequal")),
        ([[0.5, 0.5], [1.0, 0.9]], ["a", "a"], ("unequal", "equal")),
        ([], [], (None, None)),
    ],
)
def test_observations(accuracies: list, weights: list, expected: tuple) -> None:
    report = RunReport()
    report.epochs = [EpochRecord.of(1, {}, {"accuracy": row}, seconds=1.0) for row in accuracies]
    report.set_fingerprints([{"weights": digest} for digest in weights])
    observed = tuple(runner._OBSERVE[name](report, Path()) for name in ("val_accuracy", "weights"))
    assert observed == expected


def test_orders_are_read_from_the_trace(tmp_path: Path) -> None:
    def write(*digests: str) -> None:
        with TraceWriter(tmp_path / "trace.jsonl", 1) as trace:
            trace.step(0, None, True, {})
            for step, value in enumerate(digests, start=1):
                trace.step(step, 1, True, {"indices": Stage(("indices",), value.encode() * 16)})

    write("a", "b")
    assert runner._OBSERVE["orders"]({}, tmp_path) == "distinct"
    write("a", "b", "a")
    assert runner._OBSERVE["orders"]({}, tmp_path) == "repeated"


def test_unreadable_report_is_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "report.json").write_text("{")
    monkeypatch.setattr(runner, "_launch", lambda *_: ("last line", True))
    result = run_case(Case("some", tmp_path / "some.yaml", {"cause": "none"}, num_replicas=1), tmp_path)
    assert result.mismatches == ["cause"]
    assert result.problem.startswith("report.json cannot be read: ")
    assert result.problem.endswith(":\nlast line")
