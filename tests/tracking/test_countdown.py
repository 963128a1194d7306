"""The bar of an evaluation, in a log and in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from remix.tracking import countdown
from remix.tracking.countdown import Countdown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(countdown.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_now_and_then(clock: list[float]) -> None:
    log = io.StringIO()
    with Countdown(100, done=20, console=Console(file=log)) as bar:
        bar.message("loading a model with a very long name, " * 4)
        clock[0] = 50.0
        bar.begin()  # loading is over
        for now in (60.0, 62.0, 70.0):
            clock[0] = now
            bar.advance(20, "aime24", "25.0% \x1b[31mcorrect")
        clock[0] = 71.0
        bar.advance(20, "math500")
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("loading a model")
    assert lines[1:] == [
        "40/100  aime24  25.0% correct  elapsed 0:10  left 0:30",
        "80/100  aime24  25.0% correct  elapsed 0:20  left 0:07",  # 60 in 20 s, the 20 of before not counted
        "100/100  math500  elapsed 0:21  left 0:00",
    ]


def test_a_bar_in_a_terminal(clock: list[float]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    with Countdown(4, console=console) as bar:
        clock[0] = 2.0
        bar.advance(2, "arithmetic", "50.0% correct")
    assert "2/4" in screen.getvalue()
    assert "left 0:02" in screen.getvalue()
