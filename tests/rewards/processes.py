"""What runs on this machine, read from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator


def children(of: int | None = None) -> set[int]:
    """Processes that this one, or `of`, started and that run."""
    return {process for process, parent in _running() if parent == (of or os.getpid())}


def gone(process: int) -> bool:
    return process not in {running for running, _ in _running()}


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _running() -> Iterator[tuple[int, int]]:
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as stat:
                state, parent = stat.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            yield int(entry), int(parent)
