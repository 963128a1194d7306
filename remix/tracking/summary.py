"""What a finished run says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remix.terminal import showable
from remix.tracking.progress import clock

OUTPUTS = {"model": "final", "rollout log": "rollouts", "metrics": "metrics.jsonl"}
"""What a run leaves behind, by its name within the run's folder."""


def before_after_table(result: Mapping[str, Any]) -> RenderableType:
    """`result` holds base_pass_at_1, final_pass_at_1 (shares, or None), benchmarks (or none: held-out problems),
    rollouts, steps, seconds, recipe, run_dir."""
    before, after = result["base_pass_at_1"], result["final_pass_at_1"]
    scores = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("", "before", "after", "gain"):
        scores.add_column(name, justify="right" if name else "left", no_wrap=True)
    problems = ", ".join(result.get("benchmarks", ())) or "held-out problems"
    scores.add_row(f"pass@1, {problems}", _share(before), Text(_share(after), style="bold"), _gain(before, after))

    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("recipe", showable(result["recipe"]))
    facts.add_row("training steps", f"{result['steps']:,}")
    facts.add_row("rollouts", f"{result['rollouts']:,}")
    facts.add_row("wall clock", clock(result["seconds"]))
    for name, path in OUTPUTS.items():
        facts.add_row(name, showable(Path(result["run_dir"]) / path))
    return Padding(Group(scores, "", facts), (1, 1))


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _gain(before: float | None, after: float | None) -> Text:
    if before is None or after is None:
        return Text("–", style="dim")
    points = 100 * (after - before)
    return Text(f"{points:+.1f} points", style="green" if points > 0 else "red" if points < 0 else "")
