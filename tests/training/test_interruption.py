"""Signals, as a process hears them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from remix.errors import Interrupted
from remix.training import interruption
from remix.training.interruption import Interruption


def hear(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # Python runs the handler between two of its own instructions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_there_is_nothing_to_lose_it_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(Interrupted), Interruption() as heard:
        hear(number)
    assert heard.requested


def test_once_begun_only_what_may_be_abandoned_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interruption() as heard:
        heard.begin()
        with heard.abandoning():
            pass
        hear(signal.SIGTERM)  # an update in hand goes on
        assert heard.requested
        with pytest.raises(Interrupted), heard.abandoning():
            raise AssertionError("nothing is begun after the signal")
        hear(signal.SIGTERM)  # handed on by a launcher: the same wish
        hear(signal.SIGINT)
        monkeypatch.setattr(interruption, "REPEATED_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            hear(signal.SIGINT)


def test_work_in_hand_is_cut_short() -> None:
    done = []

    def work() -> None:
        with heard.abandoning():
            hear(signal.SIGTERM)
            done.append("never")

    with Interruption() as heard:
        heard.begin()
        with pytest.raises(Interrupted):
            work()
    assert done == []


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    with Interruption():
        assert [signal.getsignal(number) for number in interruption.SIGNALS] != before
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


@pytest.mark.parametrize(("missing", "status"), [(None, 75), ("rank 1 has died", 1)])
def test_the_grace_period_ends_the_process(missing: str | None, status: int) -> None:
    code = f"""
import os, signal, time
from remix.training.interruption import Interruption
with Interruption(grace=0.2) as heard:
    heard.begin()
    heard.gone = lambda: {missing!r}
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == status
    assert done.stderr.strip() == (
        f"error: {missing}"
        if missing
        else "interrupted, and not saved within 0.2 s (faults.grace): the last checkpoint counts"
    )
