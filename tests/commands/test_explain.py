"""dreplica explain: a page for every cause."""

from pathlib import Path

import pytest

from dreplica.commands.explain import EXPLAINED, explain_cause
from dreplica.errors import ExitCode, UsageError


@pytest.mark.parametrize("cause", EXPLAINED)
def test_explain_prints_the_page(cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_cause(cause) == ExitCode.AGREED
    assert capsys.readouterr().out.startswith(f"# {cause}\n")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("batch-difers", "'batch-differs'"), ("transient", "'transient-fault'"), ("batch", "'batch-differs'")],
)
def test_explain_suggests_the_nearest_cause(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain_cause(name)
    assert (caught.value.code, caught.value.fields) == ("unknown-cause", {"cause": name})
    assert f"unknown cause {name!r}. Did you mean {hint}?" in str(caught.value)


def test_explain_none_prints_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain_cause("none") == ExitCode.AGREED
    assert capsys.readouterr().out == "All replicas are bit for bit the same.\n"


def test_explain_reports_a_missing_page(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        explain_cause("unexplained", tmp_path)
    assert caught.value.code == "no-page"
