"""What a run shows while it runs: a live bar in a terminal, one plain line per step in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from remix.terminal import showable

REWARD, PASS_AT_1, ROLLOUTS = "reward/mean", "eval/pass@1", "rollouts"
"""The metrics shown, where a step has them; the last value stays until there is a newer one."""

RECENT_STEPS = 20
"""Steps over which pace is averaged."""


class Progress:
    """A context manager. `step` counts training steps done, so the last update is `update(total_steps, ...)`.

    In a terminal the display redraws itself; anywhere else each update is a line of plain text.
    """

    def __init__(
        self, name: str, run_dir: str, total_steps: int, *, enabled: bool = True, console: Console | None = None
    ) -> None:
        """`enabled`: False on all processes but one. A resumed run sets `step` and `base_pass_at_1`."""
        self.name, self.run_dir, self.total_steps = name, run_dir, total_steps
        self.step = 0
        self.phase = ""
        self.base_pass_at_1: float | None = None
        """Of the untrained model; the first one reported is taken for it."""
        self._metrics: dict[str, float] = {}
        self._stage = "starting"
        self._enabled = enabled
        self._console = console or Console()
        self._spinner = Spinner("dots")
        self._started = time.monotonic()
        # The time of each update. Loading and the first evaluation lie before the first, and are no step's pace.
        self._marks: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS + 1)
        live = enabled and self._console.is_interactive
        self._live = Live(get_renderable=self._display, console=self._console, refresh_per_second=4) if live else None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._live is not None:
            self._live.start()
        else:
            self._line(f"{self.name} -> {self.run_dir}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._stage = "stopped" if kind else "done"
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, float], phase: str) -> None:
        """After a training step, and with step 0 after the evaluation of the untrained model."""
        self.step, self.phase = step, phase
        self._metrics.update(metrics)
        if self.base_pass_at_1 is None:
            self.base_pass_at_1 = metrics.get(PASS_AT_1)
        self._marks.append((step, time.monotonic()))
        if self._live is None:
            self._line("  ".join([f"step {step}/{self.total_steps}", phase, *self._facts(), *self._clocks()]))

    def stage(self, name: str) -> None:
        """What is going on inside the step: sampling, scoring, updating, ..."""
        self._stage = name

    def message(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(Text(showable(text)))
        else:
            self._line(text)

    # --- what is shown ---

    def _line(self, text: str) -> None:
        if self._enabled:
            self._console.out(showable(text), highlight=False)

    def _display(self) -> RenderableType:
        head = Text.assemble(
            (showable(self.name), "bold"), ("  ->  ", "dim"), (showable(self.run_dir), "dim"), no_wrap=True
        )
        busy = Table.grid(padding=(0, 1))
        busy.add_row("" if self._stage in ("done", "stopped") else self._spinner, Text(self._stage, style="cyan"))
        bar = step_bar(self.phase or "warming up", self.step, self.total_steps, busy)
        facts = Text("   ").join([Text(fact) for fact in self._facts()])
        return Group(head, bar, *([facts] if facts else []), Text("   ".join(self._clocks()), style="dim"))

    def _facts(self) -> Iterator[str]:
        return facts(self._metrics, self.base_pass_at_1)

    def _clocks(self) -> Iterator[str]:
        pace = self._seconds_per_step()
        if pace is not None:
            yield seconds_per_step(pace)
        yield f"elapsed {clock(time.monotonic() - self._started)}"
        if pace is not None and self.step < self.total_steps:
            yield f"left {clock(pace * (self.total_steps - self.step))}"

    def _seconds_per_step(self) -> float | None:
        if not self._marks:
            return None
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return (ended - began) / (last - first) if last > first else None


def step_bar(phase: str, step: int, total_steps: int, beside: RenderableType) -> RenderableType:
    """How far a run is, and what it is at."""
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1, min_width=10)
    bar.add_column(no_wrap=True)
    bar.add_row(
        Text.assemble((phase, "magenta"), f"  {step:,}/{total_steps:,}"),
        ProgressBar(total=max(total_steps, 1), completed=step, complete_style="cyan", finished_style="green"),
        beside,
    )
    return bar


def facts(metrics: Mapping[str, float], base_pass_at_1: float | None) -> Iterator[str]:
    """The few numbers that say how a run goes, those of them that there are."""
    if REWARD in metrics:
        yield f"reward {metrics[REWARD]:.3f}"
    if PASS_AT_1 in metrics:
        known = base_pass_at_1 is not None and base_pass_at_1 != metrics[PASS_AT_1]
        yield f"pass@1 {metrics[PASS_AT_1]:.1%}" + (f" (base {base_pass_at_1:.1%})" if known else "")
    if ROLLOUTS in metrics:
        yield f"rollouts {metrics[ROLLOUTS]:,.0f}"


def seconds_per_step(pace: float) -> str:
    return f"{pace:.2g} s/step" if pace < 10 else f"{pace:,.0f} s/step"


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
