"""report.html in headless Chromium, at the width of a phone and of a desktop."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dreplica.report.html.render import write_report
from tests.fixtures import SMALL
from tests.harness import run_job
from tests.report.html.test_render import EVIL, poison

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("report")]

EVIL_NAME = "<script>alert(1)</script>"
PHONE, DESKTOP = (390, 844), (1280, 800)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

JOBS = {
    "agreed": ("--train.epochs=1",),
    "diverged": ("--overrides.1.determinism.onednn=false", "--train.max_steps=3", f"--run.name={EVIL_NAME}"),
    "independent": ("--train.epochs=1", "--seed.model=distinct"),
    "lost": ("--model.factory=tests.end_to_end.losing:LosingModel",),
    "stopped": ("--run.stop_after=7",),
}
LABELS = {
    "agreed": "Agreed",
    "diverged": "Diverged",
    "independent": "Independent",
    "lost": "Replica lost",
    "stopped": "Stopped",
    "running": "No verdict",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder in every state."""
    found = {}
    for state, arguments in JOBS.items():
        root = tmp_path_factory.mktemp(state)
        os.environ["LOSE"] = "1:raise"
        job = run_job(*SMALL, *arguments, root=root)
        del os.environ["LOSE"]
        (found[state],) = root.iterdir()
        assert (found[state] / "report.html").exists(), job.output
    found["running"] = Path(shutil.copytree(found["agreed"], tmp_path_factory.mktemp("running") / "run"))
    (found["running"] / "report.json").unlink()
    write_report(found["running"])
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    with sync_api.sync_playwright() as playwright:
        if program is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is on the PATH")
        # root in a container cannot create a sandbox; the pages are from this test.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """An open page, with its console output, requests and dialogs."""

    def __init__(self, browser: Any, folder: Path, size: tuple[int, int], **options: Any) -> None:
        self.size = size
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", self._dismiss)
        self.url = (folder / "report.html").resolve().as_uri()
        self.page.goto(self.url, wait_until="networkidle")

    def _dismiss(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def is_quiet(self) -> bool:
        """Return True if there was no console output, no dialog and no request but the page itself."""
        return (self.said, self.dialogs, self.requests) == ([], [], [self.url])

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("state", LABELS)
def test_verdict_is_visible_without_scrolling_or_requests(
    browser: Any, folders: dict[str, Path], state: str, size: tuple[int, int]
) -> None:
    with Opened(browser, folders[state], size) as opened:
        verdict = opened.page.locator("#verdict")
        box = verdict.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= size[1], "all of it, without scrolling"
        assert verdict.locator(".label").inner_text().startswith(LABELS[state])
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0], "no horizontal overflow"
        opened.page.locator("details").evaluate_all("every => every.forEach(details => { details.open = true })")
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0], "none with all details open"
        assert opened.is_quiet(), (opened.said, opened.dialogs, opened.requests)


def test_run_name_with_script_is_harmless(browser: Any, folders: dict[str, Path]) -> None:
    with Opened(browser, folders["diverged"], DESKTOP) as opened:
        assert opened.page.locator("header .name").inner_text() == EVIL_NAME
        assert opened.page.title() == f"{EVIL_NAME}: Diverged"
        assert EVIL_NAME in opened.page.locator("pre").text_content()
        assert opened.page.locator("script").count() == 1
        assert opened.is_quiet(), (opened.said, opened.dialogs, opened.requests)


def test_markup_in_every_text_is_harmless(browser: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["diverged"], tmp_path / "run"))
    poison(folder)
    write_report(folder)
    with Opened(browser, folder, DESKTOP) as opened:
        assert opened.page.locator(".warnings li").inner_text() == EVIL
        assert opened.page.locator("img").count() == 0
        assert opened.is_quiet(), (opened.said, opened.dialogs, opened.requests)


def test_foreign_script_is_blocked(browser: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """The policy allows one script, by its digest, even if another one gets into the page."""
    page = (folders["agreed"] / "report.html").read_text()
    (tmp_path / "report.html").write_text(page.replace("<main>", f"<main>{EVIL_NAME}"))
    with Opened(browser, tmp_path, DESKTOP) as opened:
        assert not opened.dialogs
        assert any("Content Security Policy" in line for line in opened.said)


def test_click_on_column_sorts_table(browser: Any, folders: dict[str, Path]) -> None:
    with Opened(browser, folders["diverged"], DESKTOP) as opened:
        table = opened.page.locator("table.sortable", has=opened.page.locator("th", has_text="ULP"))
        opened.page.locator("details", has=table).locator("summary").click()
        head = table.locator("th", has_text="ULP")
        column = head.evaluate("cell => cell.cellIndex")
        cells = f"rows => rows.map(row => Number(row.cells[{column}].dataset.sort))"
        found = table.locator("tbody tr").evaluate_all(cells)
        assert found not in (sorted(found), sorted(found, reverse=True))
        head.locator("button").click()
        assert table.locator("tbody tr").evaluate_all(cells) == sorted(found)
        assert head.get_attribute("aria-sort") == "ascending"
        head.locator("button").press("Enter")
        assert table.locator("tbody tr").evaluate_all(cells) == sorted(found, reverse=True)
        assert head.get_attribute("aria-sort") == "descending"
        table.locator("th button", has_text="operator").click()
        names = table.locator("tbody td:nth-child(2)").all_inner_texts()
        assert names == sorted(names)
        assert head.get_attribute("aria-sort") is None


def test_copy_button_copies_remedy(browser: Any, folders: dict[str, Path]) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    with Opened(browser, folders["diverged"], PHONE, permissions=permissions) as opened:
        opened.page.locator("button.copy").first.click()
        opened.page.locator("button.copy.done").wait_for()
        text = opened.page.evaluate("navigator.clipboard.readText()")
        assert text == "remove the override, or set it for all replicas"


def test_grid_of_many_replicas_scrolls_in_its_figure(browser: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["diverged"], tmp_path / "run"))
    report = json.loads((folder / "report.json").read_text())
    stages = report["divergence"]["stage_groups"]
    report["divergence"]["stage_groups"] = {stage: [[replica] for replica in range(40)] for stage in stages}
    (folder / "report.json").write_text(json.dumps(report))
    write_report(folder)
    with Opened(browser, folder, PHONE) as opened:
        assert opened.page.locator("table.grid td").count() == 40 * len(stages)
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]


def test_page_follows_dark_mode_of_system(browser: Any, folders: dict[str, Path]) -> None:
    shade = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    found = {}
    for scheme in ("light", "dark"):
        with Opened(browser, folders["agreed"], PHONE, color_scheme=scheme) as opened:
            found[scheme] = opened.page.evaluate(shade)
    assert found["light"] > 220
    assert found["dark"] < 40


def test_every_figure_has_its_data_as_a_table(browser: Any, folders: dict[str, Path]) -> None:
    for state in ("diverged", "independent"):
        with Opened(browser, folders[state], DESKTOP) as opened:
            figures = opened.page.locator("figure").all()
            assert len(figures) >= 3
            for figure in figures:
                tables = figure.evaluate(
                    "figure => figure.closest('section').querySelectorAll('table.sortable').length"
                )
                assert tables >= 1, figure.inner_text()
