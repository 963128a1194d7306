"""SIGTERM and Ctrl-C: a run drops or ends the work in hand, saves, and exits before the grace period is over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from remix.errors import Interrupted

EXIT_FAILED = 1
"""Exit status of a run that an error stopped."""
EXIT_INTERRUPTED = 75
"""Exit status of a run that was interrupted and can go on: EX_TEMPFAIL, "try again later"."""
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
        self.grace = grace
        self.missing: Callable[[], str | None] = lambda: None
        """Says which rank is gone, where this one waits for it; asked when the grace period is over."""
        self._abandonable = True
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python hears no signals
            self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on there is something to save, so only what runs under `abandoning` is dropped."""
        self._abandonable = False

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Work that a signal cuts short. Raises Interrupted, at once where a signal has come before."""
        if self.requested:
            raise Interrupted
        self._abandonable = True
        try:
            yield
        finally:
            self._abandonable = False

    def _heard(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
            self._timer = threading.Timer(self.grace, self._give_up)
            self._timer.daemon = True
            self._timer.start()
            if self._abandonable:
                self._abandonable = False
                raise Interrupted
        elif number == signal.SIGINT and now - self._since > REPEATED_SECONDS:
            raise KeyboardInterrupt

    def _give_up(self) -> None:
        """Every file is written whole or not at all, so the process may end at any moment."""
        missing = self.missing()
        said = (
            f"interrupted, and not saved within {self.grace:g} s (faults.grace): the last checkpoint counts"
            if missing is None
            else f"error: {missing}"
        )
        show_cursor = "\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{show_cursor}{said}\n".encode())
        os._exit(EXIT_INTERRUPTED if missing is None else EXIT_FAILED)
