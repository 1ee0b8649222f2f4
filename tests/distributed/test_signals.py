"""Signals set a flag and interrupt nothing, and handlers are restored."""

import os
import signal
from collections.abc import Iterator

import pytest

from dreplica.distributed import signals
from dreplica.distributed.signals import stop_signals

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _check_handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    after = {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_sets_the_request_and_interrupts_nothing(number: signal.Signals) -> None:
    with stop_signals() as request:
        assert not request
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request
        assert request.signal_name == number.name


def test_handlers_are_restored_after_an_exception() -> None:
    with pytest.raises(ArithmeticError), stop_signals():
        raise ArithmeticError  # the fixture compares the handlers


def test_forwarded_ctrl_c_counts_once() -> None:
    with stop_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal_name == "SIGINT"


def test_second_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with stop_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request
        now = 110.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_hangup_under_nohup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request
    finally:
        signal.signal(signal.SIGHUP, before)
