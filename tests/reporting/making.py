"""Run directories by hand, written by what writes them in training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from remix.tracking.run_log import RunLog
from remix.types import Prompt, Rollout, RolloutGroup, Score

ROLLOUTS = 100
"""Of a step."""
RECIPE: dict[str, Any] = {
    "run_dir": "somewhere",
    "seed": 1,
    "steps": 20,
    "model": {"path": "a/model"},
    "advantage": {"type": "grpo"},
    "objective": {"type": "mix_ppg"},
    "phases": [{"type": "on_policy"}],
}


def steps(count: int, **series: Sequence[float] | float) -> list[dict[str, Any]]:
    """Rows of metrics; `__` in a name stands for a slash, and a number for the same at every step."""
    named = {name.replace("__", "/"): values for name, values in series.items()}
    return [
        {"rollouts": ROLLOUTS * (step + 1)}
        | {name: values if isinstance(values, int | float) else values[step] for name, values in named.items()}
        for step in range(count)
    ]


def make_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    phases: Sequence[str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    said: Mapping[int, Sequence[tuple[str, str, Score]]] | None = None,
) -> Path:
    """`phases`: the type of each step's. `said`: by step, prompts with responses and scores. `recipe`: changes."""
    log = RunLog(folder)
    for step, row in enumerate(rows):
        log.log(step, phases[step] if phases else "on_policy", dict(row))
    ids = torch.tensor([1])
    for step, samples in (said or {}).items():
        groups = [
            RolloutGroup(
                Prompt(f"p/{number}", prompt, "42", "sum"),
                (Rollout(ids, ids, torch.zeros(1), 0, "stop", 0, response, score),),
            )
            for number, (prompt, response, score) in enumerate(samples)
        ]
        log.log_completions(step, groups, len(groups))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **(recipe or {})}), encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder
