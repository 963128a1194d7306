"""What a run shows in a terminal, in a log file, and at its end."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from remix.terminal import printable
from remix.tracking.progress import Progress, clock
from remix.tracking.summary import before_after_table


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as a list of one."""
    current = [0.0]
    monkeypatch.setattr("remix.tracking.progress.time.monotonic", lambda: current[0])
    return current


def log_file() -> Console:
    return Console(file=io.StringIO(), width=40)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_file_gets_one_plain_line_per_step(now: list[float]) -> None:
    console = log_file()
    with Progress("remix_grpo", "runs/demo", 100, console=console) as progress:
        progress.update(0, {"eval/pass@1": 0.25}, "mix_policy")
        now[0] = 3.0
        progress.stage("sampling")
        progress.update(1, {"reward/mean": 0.5, "rollouts": 5120}, "mix_policy")
        progress.message("reincarnation before step 1")
        now[0] = 5.0
        progress.update(2, {"reward/mean": 0.75, "rollouts": 10240, "eval/pass@1": 0.5}, "on_policy")
    # 5 s for 2 steps are 2.5 s a step, and 98 steps are left: 245 s.
    assert lines(console) == [
        "remix_grpo -> runs/demo",
        "step 0/100  mix_policy  pass@1 25.0%  elapsed 0:00",
        "step 1/100  mix_policy  reward 0.500  pass@1 25.0%  rollouts 5,120  3 s/step  elapsed 0:03  left 4:57",
        "reincarnation before step 1",
        "step 2/100  on_policy  reward 0.750  pass@1 50.0% (base 25.0%)  rollouts 10,240  2.5 s/step  elapsed 0:05  "
        "left 4:05",
    ]


def test_a_resumed_run_counts_its_pace_from_where_it_took_up(now: list[float]) -> None:
    console = log_file()
    with Progress("r", "d", 50, console=console) as progress:
        progress.step, progress.base_pass_at_1 = 40, 0.1
        now[0] = 60.0  # loading
        progress.update(41, {}, "on_policy")
        now[0] = 62.0
        progress.update(42, {"eval/pass@1": 0.3}, "on_policy")
    assert lines(console)[-1] == "step 42/50  on_policy  pass@1 30.0% (base 10.0%)  2 s/step  elapsed 1:02  left 0:16"


def test_pace_is_that_of_recent_steps(now: list[float]) -> None:
    console = log_file()
    with Progress("r", "d", 1000, console=console) as progress:
        for step in range(1, 60):
            now[0] += 100.0 if step < 30 else 2.0
            progress.update(step, {}, "on_policy")
    assert "2 s/step" in lines(console)[-1]


def test_other_processes_stay_silent() -> None:
    console = log_file()
    with Progress("r", "d", 2, enabled=False, console=console) as progress:
        progress.update(1, {}, "on_policy")
        progress.message("hello")
    assert lines(console) == []


def test_a_terminal_shows_a_bar_the_stage_and_messages_that_stay() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, force_interactive=True, color_system=None)
    with Progress("remix_grpo", "runs/demo", 4, console=console) as progress:
        progress.stage("sampling")
        progress.update(0, {"eval/pass@1": 0.25}, "mix_policy")
        progress.update(2, {"reward/mean": 0.5, "rollouts": 1024, "eval/pass@1": 0.5}, "mix_policy")
        progress.message("reincarnation\x1b[2J")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    last = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", shown)
    for text in ("remix_grpo  ->  runs/demo", "mix_policy  2/4", "━", "reward 0.500", "pass@1 50.0% (base 25.0%)"):
        assert text in last
    assert "rollouts 1,024" in last
    assert "done" in last
    assert "reincarnation\n" in last.replace("\r", "")
    assert "\x1b[2J" not in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is given back


def test_a_failed_run_is_not_shown_as_done() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, force_interactive=True, color_system=None)
    with pytest.raises(RuntimeError), Progress("r", "d", 4, console=console):
        raise RuntimeError
    assert isinstance(console.file, io.StringIO)
    assert "stopped" in console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6*7=42\n\tдa 你好 👩‍👩‍👧", "6*7=42\n\tдa 你好 👩‍👩‍👧"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07shown", "shown"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("over\rwritten\b\b", "overwritten"),
        ("\x9b2Jcleared\x00\x7f\x85", "cleared"),
        ("\u202egnp.exe\u2066", "gnp.exe"),
        ("half \ud83d", "half "),
        ("lone \x1b", "lone "),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected
    printable(text).encode()


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 125, 3723)] == ["0:00", "1:00", "2:05", "1:02:03"]


def result(**changes: object) -> dict[str, object]:
    return {
        "base_pass_at_1": 0.25,
        "final_pass_at_1": 0.61,
        "rollouts": 43088,
        "steps": 100,
        "seconds": 312.0,
        "recipe": "recipes/embedded/remix_grpo.yaml",
        "run_dir": "runs/demo",
    } | changes


def text_of(**changes: object) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(before_after_table(result(**changes)))
    assert isinstance(console.file, io.StringIO)
    return re.sub(r" +", " ", console.file.getvalue())


def test_before_after_table() -> None:
    text = text_of()
    for line in (
        "pass@1, held-out problems 25.0% 61.0% +36.0 points",
        "training steps 100",
        "rollouts 43,088",
        "wall clock 5:12",
        "model runs/demo/final",
        "rollout log runs/demo/rollouts",
        "metrics runs/demo/metrics.jsonl",
    ):
        assert line in text
    assert "-5.0 points" in text_of(final_pass_at_1=0.2)
    assert "not measured" in text_of(final_pass_at_1=None)
