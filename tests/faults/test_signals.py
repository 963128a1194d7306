"""SIGTERM and Ctrl-C: the run saves and exits with a status of its own, and goes on as the run it would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.harness import ENVIRONMENT, RECIPE, SMALL, assert_same_run, command
from tests.tiny import ROOT


def started(words: list[str], lines: Path, count: int) -> subprocess.Popen[str]:
    """A run that has written so many lines of metrics."""
    process = subprocess.Popen(
        words, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if lines.exists() and lines.read_text().count("\n") >= count:
            break
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)], ids=["SIGTERM twice", "SIGINT once"]
)
def test_a_scheduler_restarts_it_until_it_is_done(
    unharmed: Path, tmp_path: Path, number: signal.Signals, times: int
) -> None:
    """The loop of a scheduler around `remix train RECIPE --resume auto`: 75 means again."""
    run_dir = tmp_path / "run"
    words = [sys.executable, "-m", "remix.cli", "train", RECIPE, *SMALL, "checkpoint.every=0", f"run_dir={run_dir}"]
    statuses = []
    for count in range(1, times + 1):
        process = started([*words, "--resume", "auto"], run_dir / "metrics.jsonl", count)
        process.send_signal(number)  # after the last step it may come too late
        _, errors = process.communicate(timeout=120)
        statuses.append(process.returncode)
        if process.returncode == 0:
            break
        assert f"interrupted; --resume {run_dir} goes on from here" in errors
        assert "Traceback" not in errors
    else:
        process = started([*words, "--resume", "auto"], run_dir / "metrics.jsonl", 99)
        assert process.wait(timeout=120) == 0
    assert statuses[0] == 75
    assert set(statuses) <= {0, 75}
    assert_same_run(run_dir, unharmed)


def test_what_cannot_be_saved_in_time_is_left(tmp_path: Path) -> None:
    """The grace period ends the process wherever it is."""
    run_dir = tmp_path / "run"
    words = command(run_dir, "max_steps=40", "phases=[{type: on_policy, utd_ratio: 4000}]", "faults.grace=0.5")
    words[words.index("remix.train")] = "remix.cli"
    words.insert(words.index("remix.cli") + 1, "train")
    process = started(words, run_dir / "recipe.yaml", 1)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step 0/40"))
    time.sleep(8)  # it has sampled long since, and updates, thousands of times
    start = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - start < 15
    assert "not saved within 0.5 s (faults.grace)" in errors
