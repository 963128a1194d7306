"""SIGTERM and Ctrl-C: a run drops or ends the work in hand, saves, and exits before the grace period is over."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from remix.errors import Interrupted

EXIT_FAILED = 1
"""Exit status of a run that an error stopped."""
EXIT_INTERRUPTED = 75
"""Exit status of a run that was interrupted and can go on: EX_TEMPFAIL, "try again later"."""
STATUS_FOLDER = "REMIX_STATUS_FOLDER"
"""The variable that names a folder for the exit status of every rank: a launcher ends with a status of its own."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEATED_SECONDS = 1.0
"""A launcher hands on what it hears, so one Ctrl-C may arrive several times; a person's second comes later."""


class Interruption:
    """While it is entered, the first signal asks to stop, and a second Ctrl-C stops at once (KeyboardInterrupt).

    Work that may be dropped runs under `abandoning`, where the signal raises Interrupted. So it does from the start,
    until `begin` is called: while nothing is there yet that could be lost.
    """

    def __init__(self, grace: float = 25.0) -> None:
        """`grace`: seconds from the first signal to the end of the process, whatever it is at."""
        self.requested = False
        self.saved = False
        """What was done is saved, and the run about to end."""
        self.grace = grace
        self.gone: Callable[[], str | None] = lambda: None
        """Says which rank is gone, where this one waits for it; asked when the grace period is over."""
        self._abandonable = True
        self._since = 0.0
        self._left = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python hears no signals
            heard, written = os.pipe()
            os.set_blocking(written, False)
            self._wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            # A thread, since a main thread that hangs in native code never comes to run a handler.
            threading.Thread(target=self._count_down, args=(heard,), daemon=True).start()
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            self._left.set()
            os.close(signal.set_wakeup_fd(self._wakeup))

    def begin(self) -> None:
        """From here on there is something to save, so only what runs under `abandoning` is dropped."""
        self._abandonable = False

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Work that a signal cuts short. Raises Interrupted, at once where a signal has come before."""
        try:
            self._abandonable = True
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._abandonable = False

    def _heard(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
            if self._abandonable:
                self._abandonable = False
                raise Interrupted
        elif number == signal.SIGINT and now - self._since > REPEATED_SECONDS:
            raise KeyboardInterrupt

    def _count_down(self, heard: int) -> None:
        """Every file is written whole or not at all, so the process may end at any moment."""
        with os.fdopen(heard, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                if byte[0] in SIGNALS:
                    break
            else:
                return  # left
            if self._left.wait(self.grace):  # the pipe stays open meanwhile: each further signal writes to it
                return
        gone = self.gone()
        if gone is not None:
            say(f"error: {gone}")
        elif not self.saved:
            say(f"interrupted, and not saved within {self.grace:g} s (faults.grace): the last checkpoint counts")
        leave(EXIT_INTERRUPTED if gone is None else EXIT_FAILED)


def say(message: str) -> None:
    """A line on stderr from beside the main thread, whose display may have hidden the cursor."""
    os.write(2, (("\x1b[?25h" if os.isatty(2) else "") + message + "\n").encode())


def leave(status: int) -> NoReturn:
    """Ends the process from any thread, at once: a library's thread can hang the interpreter while it ends."""
    record(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def record(status: int) -> None:
    """This rank's exit status, for who started the launcher."""
    folder = os.environ.get(STATUS_FOLDER)
    if folder is not None:
        Path(folder, os.environ.get("RANK", "0")).write_text(str(status), encoding="utf-8")


def overall_status(folder: Path, launcher: int, ranks: int) -> int:
    """Of a run whose launcher ended so, on this machine: 75 where all its `ranks` say that they can go on."""
    if launcher == 0:
        return 0
    statuses = [int(path.read_text(encoding="utf-8") or 1) for path in sorted(folder.iterdir())]
    failures = [status for status in statuses if status not in (0, EXIT_INTERRUPTED)]
    if failures:
        return failures[0]
    if not statuses and launcher in (128 + number for number in SIGNALS):  # heard before there was a trainer
        return EXIT_INTERRUPTED
    return EXIT_INTERRUPTED if len(statuses) == ranks else launcher
