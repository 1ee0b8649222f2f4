"""Exit codes that workers pass to their launcher."""

import os

import pytest

from dreplica.distributed.launch import exit_codes


def test_codes_are_collected_by_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with exit_codes.collect() as reported:
        assert reported() == {}
        for rank, code in ((0, 3), (1, 4)):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            exit_codes.report(code)
        assert reported() == {0: 3, 1: 4}
    assert "DREPLICA_EXIT_CODES" not in os.environ


def test_report_without_a_launcher_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DREPLICA_EXIT_CODES", raising=False)
    exit_codes.report(3)
