"""One of two ranks dies or hangs: the other ends with an error that names it, in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from scripts.prove_resume import TWO_PROCESSES
from tests.faults.harness import ENVIRONMENT, RECIPE, SMALL, metrics
from tests.tiny import ROOT

TIMEOUT = 20.0


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of two processes that has done a step."""
    (tmp_path / "accelerate.yaml").write_text(TWO_PROCESSES)
    words = [*SMALL, "max_steps=40", f"faults.rank_timeout={TIMEOUT}", f"run_dir={tmp_path / 'run'}"]
    launch = [sys.executable, "-m", "remix.cli", "train", "--config_file", str(tmp_path / "accelerate.yaml")]
    process = subprocess.Popen(
        [*launch, RECIPE, *words],
        cwd=ROOT, env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline, lines = time.monotonic() + 120, tmp_path / "run" / "metrics.jsonl"
    while not (lines.exists() and lines.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    tree = psutil.Process(process.pid).children(recursive=True)
    yield process
    for one in tree:
        if one.is_running():
            one.kill()
    process.kill()
    process.wait()


def rank(process: subprocess.Popen[str], number: int) -> psutil.Process:
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == str(number) and "remix.train" in child.cmdline():
            return child
    raise AssertionError(f"no rank {number}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named(two_ranks: subprocess.Popen[str], tmp_path: Path, victim: int) -> None:
    pid = rank(two_ranks, victim).pid
    os.kill(pid, signal.SIGKILL)
    _, errors = two_ranks.communicate(timeout=60)
    assert two_ranks.returncode != 0
    assert f"error: rank {victim} (process {pid} on " in errors
    assert "has died" in errors
    assert "--resume" in errors
    assert metrics(tmp_path / "run")


def test_a_rank_that_hangs_is_named_within_the_time_out(two_ranks: subprocess.Popen[str]) -> None:
    for number in (0, 1):  # they speak over loopback; the launcher's store is another matter
        listening = [c.laddr.ip for c in rank(two_ranks, number).net_connections("tcp") if c.status == "LISTEN"]
        assert listening, "gloo listens"
        assert {ip for ip in listening if not ip_address(ip).is_loopback} == set()
    stopped = rank(two_ranks, 1)
    stopped.suspend()
    started = time.monotonic()
    assert two_ranks.stderr is not None
    line = next(line for line in two_ranks.stderr if line.startswith("error: "))
    assert time.monotonic() - started < TIMEOUT + 20
    assert f"rank 0 has waited {TIMEOUT:g} s (faults.rank_timeout)" in line
    assert f"rank 1 (process {stopped.pid} on " in line
    assert "hangs (it is stopped)" in line
    stopped.kill()  # or the launcher gives it 30 seconds more
    assert two_ranks.wait(timeout=60) != 0
