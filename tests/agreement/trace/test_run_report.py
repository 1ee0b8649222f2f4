"""report.json: writing and reading it. Schema 1 is in test_run_report_schema1."""

import json
from pathlib import Path
from typing import Any

import pytest

from dreplica.agreement.trace.report_records import EpochRecord, ReplicaInfo, RunInfo, SkippedCheckpoint
from dreplica.agreement.trace.run_report import ReportError, RunReport
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict

OPERATOR = {
    "index": 3,
    "operator": "aten.mm.default",
    "module": "0",
    "phase": "forward",
    "max_ulp": 2**60,
    "max_absolute": 1e-5,
    "relative": None,
    "num_differing": 3,
    "num_compared": 4,
    "num_elements": 4,
}


def epoch(number: int, **values: list[float]) -> EpochRecord:
    part = {"accuracy": [0.5, 0.5], "loss": [1.0, 1.0]}
    return EpochRecord.of(number, part, {name: values.get(name, given) for name, given in part.items()}, seconds=1.0)


def full_report() -> RunReport:
    verdict = Verdict(
        False,
        "transient-fault",
        "replicas diverged",
        step=3,
        stage="weights",
        groups=[[0], [1]],
        evidence=[Evidence("text", "one line", {"step": 3})],
        remedy=[Remedy("text", "what it does", "dreplica doctor", {})],
        stage_groups={"weights": [[0], [1]]},
        path={"replicas": [0, 1], "num_operators": 1, "operators": [OPERATOR]},
    )
    report = RunReport(run=RunInfo(name="run", folder="runs/run"), replicas=[ReplicaInfo(replica=0, host="a", seed=4)])
    report.run.skipped_checkpoints = [SkippedCheckpoint(name="step_5", replica=1, code="damaged", reason="a bit")]
    report.epochs = [epoch(1), epoch(2, loss=[float("nan"), 2.0])]
    report.set_fingerprints([{"weights": "ab"}, {"weights": "cd"}])
    report.warnings = ["a warning"]
    report.conclude(verdict)
    return report


def test_report_survives_writing_and_reading(tmp_path: Path) -> None:
    report = full_report()
    report.write(tmp_path)
    read = RunReport.read(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert read.as_dict() == content
    assert content["schema"] == 2
    assert content["verdict"]["groups"] == content["divergence"]["stage_groups"]["weights"] == [[0], [1]]
    assert content["verdict"]["evidence"] == [{"code": "text", "text": "one line", "data": {"step": 3}}]
    (remedy,) = content["verdict"]["remedy"]
    assert (remedy["code"], remedy["text"], remedy["command"]) == ("text", "what it does", "dreplica doctor")
    assert content["epochs"][1]["val"] == {
        "accuracy": [{"replicas": [0, 1], "value": 0.5}],
        "loss": [{"replicas": [0], "value": None}, {"replicas": [1], "value": 2.0}],
    }
    assert content["fingerprints"][1] == {"replica": 1, "weights": "cd"}
    assert content["run"]["skipped_checkpoints"][0]["code"] == "damaged"
    assert read.epochs[1].values("val", "loss") == [None, 2.0]


def test_evidence_and_remedies_survive_writing_and_reading(tmp_path: Path) -> None:
    evidence = Evidence.of("entries-differ", num_differing=1, num_entries=2, stage="weights", some="0.weight")
    remedies = [Remedy.of("disable-tf32"), Remedy.of("use-instead", instead="torch.sort")]
    report = RunReport(verdict=Verdict(False, "unexplained", "why", evidence=[evidence], remedy=remedies))
    report.write(tmp_path)
    assert RunReport.read(tmp_path).verdict == report.verdict


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, "no-report", "there is no report.json"),
        ('{"cut": off', "damaged-report", "report.json cannot be read: "),
        ("[" * 100_000, "damaged-report", "report.json cannot be read: "),
        ("[]", "not-a-report", "expected an object, got list"),
        ("{}", "not-a-report", "invalid schema=None: expected 1 or 2"),
        ('{"schema": 3}', "newer-report", "has schema 3, expected 2 or lower. Upgrade dreplica."),
        ('{"schema": 2, "verdict": {"cause": "none"}}', "not-a-report", "verdict.agreed: Field required"),
        ('{"schema": 1, "run": []}', "not-a-report", "run: Input should be"),
        ('{"schema": 1, "epochs": [3, {"train": 3}]}', "not-a-report", "epochs.0: Input should be"),
    ],
)
def test_read_raises_error_with_code(content: str | None, code: str, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ReportError, match=r"report\.json") as caught:
        RunReport.read(tmp_path)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_read_valid_parts_leaves_out_invalid_fields(tmp_path: Path) -> None:
    content: dict[str, Any] = full_report().as_dict() | {"warnings": 3, "run": {"seconds": 10**400}}
    (tmp_path / "report.json").write_text(json.dumps(content).replace("NaN", "null"))
    report, problems = RunReport.read_valid_parts(tmp_path)
    assert [problem.partition(":")[0] for problem in problems] == ["warnings", "run.seconds"]
    assert (report.warnings, report.run.name) == ([], "")
    assert report.verdict is not None
    assert report.verdict.groups == [[0], [1]]


def test_first_differing_result_ignores_equal_nan() -> None:
    report = RunReport()
    assert report.first_differing_result() is None
    report.epochs = [epoch(1), epoch(2, loss=[float("nan"), float("nan")])]
    assert report.first_differing_result() is None, "both are NaN"
    report.epochs.append(epoch(3, accuracy=[0.5, 0.25]))
    assert report.first_differing_result() == (3, "validation accuracy", [0.5, 0.25])
