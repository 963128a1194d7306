"""How far a piece of work of known size is: a live bar in a terminal, now and then a plain line anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from remix.terminal import showable
from remix.tracking.progress import clock

LINE_SECONDS = 10.0
"""Between two plain lines, unless a stage has ended."""


class Countdown:
    """A context manager. What was `done` before, by an interrupted run, does not count towards the pace."""

    def __init__(self, total: int, *, done: int = 0, console: Console | None = None) -> None:
        self._total, self._done, self._before = total, done, done
        self._console = console or Console()
        self._started, self._last_line = time.monotonic(), float("-inf")
        self._bar: Progress | None = None
        if self._console.is_interactive:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[clocks]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("starting", total=total, completed=done, clocks="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self) -> None:
        """From here on time counts: what came before was loading."""
        self._started = time.monotonic()

    def advance(self, count: int, stage: str, fact: str = "") -> None:
        """So many more are done, in this stage; `fact` is a word on how it goes."""
        self._done += count
        text = "  ".join(showable(part) for part in (stage, fact) if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text, clocks=self._clocks())
        elif self._done == self._total or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.out(f"{self._done:,}/{self._total:,}  {text}  {self._clocks()}", highlight=False)

    def message(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(showable(text)), soft_wrap=True)

    def _clocks(self) -> str:
        elapsed = time.monotonic() - self._started
        fresh = self._done - self._before
        left = f"  left {clock(elapsed / fresh * (self._total - self._done))}" if fresh else ""
        return f"elapsed {clock(elapsed)}{left}"
