"""`dreplica explain`: prints the page of a cause."""

from pathlib import Path

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.config.messages import nearest
from dreplica.config.paths import CAUSES_FOLDER
from dreplica.errors import ExitCode, UsageError

EXPLAINED = sorted(CAUSES.keys() - {"none"})
"""Codes of the causes that have a page."""


def explain_cause(name: str, folder: Path = CAUSES_FOLDER) -> ExitCode:
    """Print the page of a cause to standard output, or for `none` its one sentence.

    Args:
        name: Code of the cause, as verdicts name it: `batch-differs`.
        folder: Folder of the pages, `<cause>.md`.

    Returns:
        `AGREED`, which is exit code 0.

    Raises:
        UsageError: If there is no such cause, with the nearest name, or its page is missing.
    """
    if name == "none":
        print(CAUSES[name].explanation)
        return ExitCode.AGREED
    if name not in EXPLAINED:
        raise UsageError(
            f"unknown cause {name!r}. {nearest(name, EXPLAINED)} Run dreplica explain --help for all causes.",
            code="unknown-cause",
            cause=name,
        )
    path = folder / f"{name}.md"
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot read {str(path)!r} ({error.strerror}). Reinstall dreplica.", code="no-page", cause=name
        ) from None
    print(page.strip())
    return ExitCode.AGREED
