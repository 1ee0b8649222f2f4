"""`dreplica explain`: prints the page of a cause, or what to look for in a stage in which two runs first differ."""

import re
from pathlib import Path

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.config.messages import nearest
from dreplica.config.paths import CAUSES_FOLDER, STAGES_PAGE
from dreplica.errors import ExitCode, UsageError
from dreplica.state.fingerprint.stage import STAGES

EXPLAINED = sorted(CAUSES.keys() - {"none"})
"""Codes of the causes that have a page."""

EXPLAINED_STAGES = ("build", *STAGES)
"""Stages that have a section, in causal order. `build` is the state before training, step 0."""

_HEADING = re.compile(r"^## (\w+)$", re.MULTILINE)
_LINK = re.compile(r"\[(\w+)\]\(#\w+\)")


def explain(name: str, folder: Path = CAUSES_FOLDER, stages_page: Path = STAGES_PAGE) -> ExitCode:
    """Print the page of a cause or the section of a stage to standard output.

    Args:
        name: Code of the cause, as verdicts name it (`batch-differs`), or name of the stage (`batch`). For the cause
            `none`, its one sentence is printed.
        folder: Folder of the causes' pages, `<cause>.md`.
        stages_page: Page with a section for each stage.

    Returns:
        `AGREED`, which is exit code 0.

    Raises:
        UsageError: If there is neither such a cause nor such a stage, with the nearest name, or its page is missing.
    """
    if name == "none":
        print(CAUSES[name].explanation)
    elif name in EXPLAINED_STAGES:
        print(stage_sections(_read(stages_page, name))[name])
    elif name in EXPLAINED:
        print(_read(folder / f"{name}.md", name).strip())
    else:
        raise UsageError(
            f"unknown cause or stage {name!r}. {nearest(name, [*EXPLAINED, *EXPLAINED_STAGES])} Run dreplica explain "
            "--help for all of them.",
            code="unknown-cause",
            cause=name,
        )
    return ExitCode.AGREED


def stage_sections(page: str) -> dict[str, str]:
    """Return the sections of the page "My two runs differ" by stage, as they are printed.

    Links between sections become the command that prints the other section.
    """
    _, *parts = _HEADING.split(_LINK.sub(r"`dreplica explain \1`", page))
    return {stage: f"# {stage}\n\n{text.strip()}" for stage, text in zip(parts[::2], parts[1::2], strict=True)}


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot read {str(path)!r} ({error.strerror}). Reinstall dreplica.", code="no-page", cause=name
        ) from None
