"""dreplica explain: a page for every cause, and a section for every stage."""

from pathlib import Path

import pytest

from dreplica.commands.explain import EXPLAINED, EXPLAINED_STAGES, explain, stage_sections
from dreplica.config.paths import STAGES_PAGE
from dreplica.errors import ExitCode, UsageError


@pytest.mark.parametrize("cause", EXPLAINED)
def test_explain_prints_the_page(cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(cause) == ExitCode.AGREED
    assert capsys.readouterr().out.startswith(f"# {cause}\n")


@pytest.mark.parametrize("stage", EXPLAINED_STAGES)
def test_explain_prints_the_section(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(stage) == ExitCode.AGREED
    printed = capsys.readouterr().out
    assert printed.startswith(f"# {stage}\n\n")
    assert "\n### " in printed
    assert "\n## " not in printed
    assert "](#" not in printed, "a link leads nowhere in a terminal"


def test_stage_sections_are_those_of_the_page() -> None:
    assert tuple(stage_sections(STAGES_PAGE.read_text(encoding="utf-8"))) == EXPLAINED_STAGES


def test_stage_sections_replace_links_by_commands() -> None:
    sections = stage_sections("# Page\n\nText.\n\n## rng\n\nSee [build](#build).\n\n### More\n\n## build\n\n")
    assert sections == {"rng": "# rng\n\nSee `dreplica explain build`.\n\n### More", "build": "# build\n\n"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("batch-difers", "'batch-differs'"),
        ("transient", "'transient-fault'"),
        ("bacth", "'batch'"),
        ("Gradients", "'gradients'"),
        ("weight", "'weights'"),
        ("buid", "'build'"),
    ],
)
def test_explain_suggests_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(name)
    assert (caught.value.code, caught.value.fields) == ("unknown-cause", {"cause": name})
    assert f"unknown cause or stage {name!r}. Did you mean {hint}?" in str(caught.value)


def test_explain_none_prints_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("none") == ExitCode.AGREED
    assert capsys.readouterr().out == "All replicas are bit for bit the same.\n"


@pytest.mark.parametrize("name", ["unexplained", "batch"])
def test_explain_reports_a_missing_page(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        explain(name, tmp_path, tmp_path / "stages.md")
    assert caught.value.code == "no-page"
