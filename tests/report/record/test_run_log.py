"""log.txt: the log records of rank 0, with their times."""

import logging
import re
from pathlib import Path

import pytest

from dreplica.distributed.log_setup import ON_STDOUT, set_up_logging
from dreplica.report.record.run_log import LOG_NAME, RunLog
from tests.fixtures import SMALL
from tests.harness import run_job

log = logging.getLogger("dreplica.somewhere")
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")


def lines(folder: Path) -> list[str]:
    texts = (folder / LOG_NAME).read_text().splitlines()
    assert all(TIME.match(text) for text in texts)
    return [TIME.sub("", text) for text in texts]


def test_records_from_before_the_folder_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0)
    log.info("early")
    run_log = RunLog(tmp_path)
    log.warning("later")
    log.info("on the terminal", extra=ON_STDOUT)
    log.debug("detail")
    run_log.close()
    log.info("after the run")
    assert lines(tmp_path) == ["INFO: early", "WARNING: later", "INFO: on the terminal"]
    assert capsys.readouterr().err == "early\nwarning [replica 0]: later\nafter the run\n"


def test_run_log_appends_for_a_second_run(tmp_path: Path) -> None:
    for number in range(2):
        set_up_logging(0)
        run_log = RunLog(tmp_path)
        log.info("run %d", number)
        run_log.close()
    assert lines(tmp_path) == ["INFO: run 0", "INFO: run 1"]


def test_records_are_not_repeated_in_the_next_folder(tmp_path: Path) -> None:
    set_up_logging(0)
    log.info("early")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run_log = RunLog(tmp_path / name)
        log.info(name)
        run_log.close()
    assert lines(tmp_path / "two") == ["INFO: two"]


def test_full_disk_disables_the_file_with_one_warning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    set_up_logging(0)
    (tmp_path / LOG_NAME).symlink_to("/dev/full")
    run_log = RunLog(tmp_path)
    log.info("one")
    log.info("two")
    error = capsys.readouterr().err
    assert error.count("disabled after an error") == 1
    assert "Traceback" not in error
    assert error.endswith("two\n")
    run_log.close()


def test_unencodable_text_is_escaped(tmp_path: Path) -> None:
    set_up_logging(0)
    run_log = RunLog(tmp_path)
    log.info("file \udcff")
    run_log.close()
    assert lines(tmp_path) == ["INFO: file \\udcff"]


def test_log_is_appended_on_resume_and_trace_is_the_same(tmp_path: Path) -> None:
    stopped = run_job(*SMALL, "--run.stop_after=7", root=tmp_path / "resumed")
    first = lines(stopped.folder)
    job = run_job(*SMALL, root=tmp_path / "resumed")
    texts = lines(job.folder)
    assert texts[: len(first)] == first
    assert any("AGREED 2 replicas, 7 steps" in text for text in first)
    assert any("resuming from" in text for text in texts[len(first) :])
    assert [text.split()[1:3] for text in texts if text.startswith("INFO:     ")] != []
    assert texts[-1] == "INFO: AGREED 2 replicas, 10 steps: bit-identical"
    assert job.trace == run_job(*SMALL, root=tmp_path / "whole").trace
