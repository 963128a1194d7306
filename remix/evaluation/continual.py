"""What a run of tasks one after the other has come to, on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from remix.durable import write_json

RECORD = "continual.json"


@dataclass
class Learnt:
    """One task, learnt and merged. Accuracies are pass@1 by task."""

    task: str
    own: dict[str, float]
    """Of the adapter that was trained on it, before merging."""
    merged: dict[str, float]
    """Of what the run goes on with; under `independent` and `pam+tall` each task so far by its own adapter or mask."""
    sign_conflict: float | None
    """Share of the important entries of the global adapter whose sign the task's adapter has turned, before merging."""
    rollouts: int
    seconds: float


@dataclass
class Record:
    """What a continual run has come to."""

    method: dict[str, Any]
    order: list[str]
    base: dict[str, float] = field(default_factory=dict)
    """pass@1 by task before anything was learnt."""
    learnt: list[Learnt] = field(default_factory=list)

    @property
    def matrix(self) -> list[list[float]]:
        """a[t][i]: pass@1 on task i after task t, as far as the run has come."""
        return [[row.merged[task] for task in self.order] for row in self.learnt]

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / RECORD, asdict(self))


def read_record(run_dir: Path) -> Record:
    """Raises ValueError where there is none."""
    path = run_dir / RECORD
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**plain, "learnt": [Learnt(**row) for row in plain["learnt"]]})
    except FileNotFoundError:
        raise ValueError(f"{run_dir}: no {RECORD} there, so this is no run with a `continual:` block") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a record of a continual run ({error})") from None
