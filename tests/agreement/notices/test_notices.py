"""Where the warnings of a run appear: once in the log, in the verdict, and in report.json."""

import json
import logging
import string
from pathlib import Path

import pytest
import torch

from dreplica.agreement.notices.warning_texts import WARNINGS, warning
from dreplica.agreement.trace.run_report import RunReport
from dreplica.agreement.verdict.verdict import Divergence
from tests.agreement.notices.loop import make_model, sgd, train


def test_each_warning_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dreplica"):
        agreement = train(change_loss=lambda step, loss: loss * torch.nan if step >= 3 else loss)
    assert [record.getMessage() for record in caplog.records] == [each.text for each in agreement.warnings]
    assert len(agreement.warnings) == 1


def test_warnings_are_in_verdict_and_report(tmp_path: Path) -> None:
    model = make_model()
    agreement = train(model, sgd(model[0]), record=tmp_path / "run")
    (found,) = agreement.warnings
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["notices"] == [found.as_dict()]
    assert report["warnings"] == [found.text]
    assert report["verdict"]["summary"].endswith("; 1 warning")
    assert report["verdict"]["evidence"] == [found.as_dict()]
    read = RunReport.read(tmp_path / "run")
    assert [notice.code for notice in read.notices] == ["parameter-not-optimized"]


def test_warnings_before_a_divergence_are_in_report(tmp_path: Path) -> None:
    train(steps=5, record=tmp_path / "one")
    with pytest.raises(Divergence):
        train(
            steps=5,
            change_loss=lambda step, loss: loss * torch.nan if step == 3 else loss,
            record=tmp_path / "two",
            reference=tmp_path / "one",
        )
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert [notice["code"] for notice in report["notices"]] == ["loss-not-finite"]


def test_old_report_has_no_notices(tmp_path: Path) -> None:
    RunReport().write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    del content["notices"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert RunReport.read(tmp_path).notices == []


def test_every_template_is_one_line() -> None:
    for code, template in WARNINGS.items():
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
        text = warning(code, **dict.fromkeys(fields, 1)).text
        assert "\n" not in text
        assert "{" not in text
