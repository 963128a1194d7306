"""A run on a terminal of any width: how far, how well, how far off-policy, where the time goes, what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.panel import Panel
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from remix.terminal import showable
from remix.tracking.follow import RunState, completion_text, number
from remix.tracking.progress import (
    PASS_AT_1,
    RECENT_STEPS,
    REWARD,
    ROLLOUTS,
    clock,
    facts,
    seconds_per_step,
    step_bar,
)

LAMBDA = "kl/lambda"
SHOWN = (REWARD, PASS_AT_1, ROLLOUTS, LAMBDA)
"""Metrics above the curves; the last value stays until there is a newer one."""
WIDE, BESIDE, NARROW = 110, 76, 60
"""Columns from which the tables stand side by side, from which they do with less in them, and below which a curve's
least and largest value are left out."""
TALL = 38
"""Lines from which they need not."""
CURVES = {
    REWARD: "reward",
    PASS_AT_1: "pass@1",
    "response/length": "length",
    "entropy": "entropy",
    "kl/reference": "KL to reference",
    "kl/precedent": "KL to precedent",
    LAMBDA: "λ",
    "ess": "ESS",
    "clip_fraction": "clipped",
}
"""Metrics drawn over the steps, and what they are called."""
BY_LAG = {
    "tokens": "tokens",
    "ratio/mean": "ratio",
    "ratio/p05": "p05",
    "ratio/p95": "p95",
    "clip_fraction": "clipped",
    "ess": "ESS",
}
LONGEST_TEXT = 1500
"""Characters of a prompt or a response that are shown."""
PATIENCE_STEPS, PATIENCE_SECONDS = 3.0, 30.0
"""A run that has written nothing for so many of its longest steps, and so many seconds more, may be gone."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_PHASE_STYLES = ("cyan", "green", "yellow", "magenta")


class RunView:
    """Drawn anew for the width that there is."""

    def __init__(self, state: RunState, lines: int | None = None) -> None:
        """`lines`: of the display; None: as many as it takes."""
        self.state, self.lines = state, lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state, width = self.state, options.max_width
        yield from _head(state)
        if state.rows:
            brief = self.lines is not None and self.lines < TALL and BESIDE <= width < WIDE
            curves = _curves(state.rows, extents=width >= NARROW and not brief)
            details = Group(*_details(state.rows, brief=brief))
            yield ""
            if brief or width >= WIDE:
                grid = Table.grid(padding=(0, 3), expand=True)
                grid.add_column(ratio=1)
                grid.add_column()
                grid.add_row(curves, details)
                yield grid
            else:
                yield from (curves, "", details)
        if state.completion is not None:
            yield ""
            yield _completion(state.completion)


# --- how far ------------------------------------------------------------------------------------------------------


def _head(state: RunState) -> Iterator[RenderableType]:
    last = state.rows[-1] if state.rows else {}
    yield Text.assemble((showable(state.place), "bold"), *([f"   {state.task}"] if state.task else []), overflow="fold")
    phase = showable(last.get("phase", "no step yet"))
    yield step_bar(phase, state.steps_done, state.last_step or state.steps_done, _alive(state))
    shown = {name: value for name in SHOWN if (value := _latest(state.rows, name)) is not None}
    base = None if state.result is None else number(state.result, "base_pass_at_1")
    words = [*facts(shown, base)]
    if LAMBDA in shown:
        words.append(f"λ {shown[LAMBDA]:.2f}")
    words += [f"reincarnated before step {step}" for step in _reincarnations(state.rows)]
    yield Text("   ").join([Text(word) for word in words])
    clocks = "   ".join(_clocks(state))
    if clocks:
        yield Text(clocks, style="dim")
    if state.unreadable:
        yield Text(f"metrics.jsonl: lines that are damaged, left out: {state.unreadable}", style="red")


def _alive(state: RunState) -> Text:
    """Whether it still runs, as far as its files can tell."""
    if state.finished:
        return Text("done", style="green")
    if not state.rows:
        return Text(f"begun {clock(state.silence)} ago", style="cyan")
    longest = max((number(row, "time/step") or 0.0 for row in state.rows), default=0.0)
    if state.silence <= PATIENCE_STEPS * longest + PATIENCE_SECONDS:
        return Text(f"running, last step {clock(state.silence)} ago", style="cyan")
    # An evaluation may take longer than any step did, and is part of one.
    return Text(f"silent for {clock(state.silence)}: evaluates, hangs or ended", style="bold red")


def _clocks(state: RunState) -> Iterator[str]:
    seconds = _recent(state.rows, "time/step")
    if not seconds:
        return
    pace = fmean(seconds)
    yield seconds_per_step(pace)
    yield f"in steps {clock(sum(number(row, 'time/step') or 0.0 for row in state.rows))}"
    left = (state.last_step or 0) - state.steps_done
    if left > 0 and not state.finished:
        yield f"left {clock(max(pace * left - min(state.silence, pace), 0.0))}"


def _latest(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((value for row in reversed(rows) if (value := number(row, name)) is not None), None)


def _recent(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = (number(row, name) for row in rows[-RECENT_STEPS:])
    return [value for value in values if value is not None and math.isfinite(value)]


def _reincarnations(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps that are the first of another phase. Phases of the same type in a row cannot be told apart."""
    return [int(row["step"]) for before, row in pairwise(rows) if row.get("phase") != before.get("phase")]


# --- curves -------------------------------------------------------------------------------------------------------


def _curves(rows: Sequence[Mapping[str, Any]], *, extents: bool) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, justify="right")
    table.add_column(ratio=1, min_width=8)
    table.add_column(no_wrap=True, style="dim")
    borders = _reincarnations(rows)
    for name, label in CURVES.items():
        points = [(int(row["step"]), value) for row in rows if (value := number(row, name)) is not None]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            values = [value for _, value in points]
            phases = [sum(step >= border for border in borders) for step, _ in points]
            last, low, high = (
                f"{value:.1%}" if name == PASS_AT_1 else short(value)
                for value in (values[-1], min(values), max(values))
            )
            extent = low if low == high else f"{low} to {high}"
            table.add_row(label, last, Sparkline(values, phases), extent if extents else "")
    return table


@dataclass(frozen=True)
class Sparkline:
    """One line of blocks from the least value to the largest, in a colour for each phase."""

    values: Sequence[float]
    phases: Sequence[int]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, max(options.max_width, 1))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = len(self.values)
        width = min(count, options.max_width)
        low, high = min(self.values), max(self.values)
        for cell in range(width):
            first, end = cell * count // width, (cell + 1) * count // width
            height = (fmean(self.values[first:end]) - low) / (high - low) if high > low else 0.0
            style = _PHASE_STYLES[self.phases[end - 1] % len(_PHASE_STYLES)]
            yield Segment(_BLOCKS[min(int(height * len(_BLOCKS)), len(_BLOCKS) - 1)], Style(color=style))


def short(value: float) -> str:
    """Three digits, or all of a larger whole number."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


# --- off-policy, time, words --------------------------------------------------------------------------------------


def _details(rows: Sequence[Mapping[str, Any]], *, brief: bool) -> Iterator[RenderableType]:
    row = rows[-1]
    lags = sorted(int(found[1]) for name in row if (found := _OF_LAG.fullmatch(name)))
    if lags:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        shown = {name: label for name, label in BY_LAG.items() if not (brief and label in ("p05", "p95"))}
        for label in ("lag", *shown.values()):
            table.add_column(label, justify="right", no_wrap=True)
        for lag in lags:
            values = (number(row, f"{name}/lag={lag}") for name in shown)
            table.add_row(str(lag), *("–" if value is None else short(value) for value in values))
        yield table
        yield ""
    stages = {
        name.removeprefix("time/"): sum(_recent(rows, name))
        for name in dict.fromkeys(name for row in rows[-RECENT_STEPS:] for name in row if name.startswith("time/"))
    }
    total = stages.pop("step", 0.0)
    if total > 0:
        steps = len(_recent(rows, "time/step"))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for label in ("seconds of a step", "mean", ""):
            table.add_column(label, justify="right" if label == "mean" else "left", no_wrap=True)
        for stage, seconds in sorted(stages.items(), key=lambda pair: -pair[1]):
            if seconds >= 0.005 * total:
                share, longest = seconds / total, 8 if brief else 20
                table.add_row(showable(stage), short(seconds / steps), f"{share:4.0%} " + "█" * round(longest * share))
        yield table


def _completion(row: Mapping[str, Any]) -> RenderableType:
    reward = number(row, "reward")
    words = [f"step {row['step']}", *([] if reward is None else [f"reward {short(reward)}"])]
    for key, label in (("verdict", ""), ("answer", "answer ")):
        words += [f"{label}{_cut(showable(row[key]), 60)}"] if row.get(key) else []
    prompt, response = (_cut(showable(completion_text(row.get(key, ""))).strip(), LONGEST_TEXT) for key in _SPOKEN)
    body = Text.assemble((f"{prompt}\n", "dim"), response, overflow="fold")
    title = Text("a completion of " + ", ".join(words), style="dim")
    return Panel(body, title=title, title_align="left", border_style="dim")


_SPOKEN = ("prompt", "response")
_OF_LAG = re.compile(r"tokens/lag=([0-9]{1,9})")


def _cut(text: str, most: int) -> str:
    """Without its middle, where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
