"""What a run leaves behind to read: metrics, completions, the result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remix.durable import write_text

if TYPE_CHECKING:
    from remix.types import RolloutGroup


class RunLog:
    """Lines of JSON, on the disk as they are written. `from_step` cuts off what lies beyond the step resumed from."""

    def __init__(self, run_dir: Path, *, from_step: int = 0, unlogged: bool = False, enabled: bool = True) -> None:
        """`unlogged`: the metrics of the step before are still to come. `enabled` is False on every process but the
        first: one run, one log."""
        self.metrics_path = run_dir / "metrics.jsonl"
        self.completions_path = run_dir / "completions.jsonl"
        self.enabled = enabled
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        _keep_before(self.metrics_path, from_step - unlogged)
        _keep_before(self.completions_path, from_step)

    def log(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        self._append(self.metrics_path, [{"step": step, "phase": phase, **metrics}])

    def log_completions(self, step: int, groups: Sequence[RolloutGroup], count: int) -> None:
        """The first response of each of the first groups."""
        rows = [
            {
                "step": step,
                "prompt_id": group.prompt.id,
                "prompt": group.prompt.content if isinstance(group.prompt.content, str) else [*group.prompt.content],
                "answer": group.prompt.answer,
                "response": rollout.text,
                "reward": rollout.score.value if rollout.score else None,
                "verdict": rollout.score.verdict if rollout.score else None,
            }
            for group in groups[:count]
            for rollout in group.rollouts[:1]
        ]
        self._append(self.completions_path, rows)

    def _append(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.enabled:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint will count on them


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out."""
    return _read(run_dir / "metrics.jsonl")


def read_completions(run_dir: Path) -> list[dict[str, Any]]:
    """Those of completions.jsonl, in the same way."""
    return _read(run_dir / "completions.jsonl")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [parse_row(line, f"{path}:{number}") for number, line in enumerate(lines[:-1], 1)]


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """A line of a log. Raises ValueError where it is no JSON object with a step; `where` it stands, for the message."""
    try:
        row = json.loads(line.decode())
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row
        found = "no JSON object with a `step`"
    except (ValueError, RecursionError) as error:
        found = f"not JSON ({error})"
    raise ValueError(f"{where}: {found}; the log is damaged: remove the line")


def _keep_before(path: Path, step: int) -> None:
    rows = [row for row in _read(path) if row["step"] < step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
