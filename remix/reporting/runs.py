"""A run directory as the report reads it: one that is finished, still going or was killed in the middle of a line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from remix.config.reading import read_yaml
from remix.tracking.run_log import read_completions, read_metrics

PASS_AT_1 = "eval/pass@1"
Z = 1.96
"""Standard deviations to either side of an interval of 95%."""

Metrics = Mapping[str, float | None]
"""By name; None where the value is not finite."""


class Row(NamedTuple):
    """One training step."""

    steps: int
    """Training steps done after it, from 1."""
    rollouts: float
    """Sampled so far, this step's included."""
    phase: str
    metrics: Metrics


class Evaluation(NamedTuple):
    steps: int
    """Training steps done before it; 0 = the untrained model."""
    rollouts: float
    metrics: Metrics


class Phase(NamedTuple):
    """A stretch of the run, from one reincarnation to the next; training steps done and rollouts at both ends."""

    type: str
    start: int
    end: int
    rollouts_start: float
    rollouts_end: float


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    path: Path
    rows: Sequence[Row]
    """At least one."""
    evaluations: Sequence[Evaluation]
    reincarnations: Sequence[int]
    """Training steps done before each."""
    recipe: Mapping[str, Any]
    """As it stands in recipe.yaml; empty where that is missing or unreadable."""
    recipe_text: str
    result: Mapping[str, Any] | None
    """None: the run is not finished."""
    completions: Sequence[Mapping[str, Any]]
    not_finite: Mapping[str, int]
    """Metrics that were NaN or infinite, with the first step (done) that they were so at."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def steps(self) -> int:
        return self.rows[-1].steps

    @property
    def rollouts(self) -> float:
        return self.rows[-1].rollouts

    @property
    def planned(self) -> int | None:
        """The steps that the recipe asks for."""
        asked = [self.recipe.get(key) for key in ("steps", "max_steps")]
        return min((steps for steps in asked if isinstance(steps, int)), default=None)

    @property
    def seconds(self) -> float:
        """Wall clock: of the whole run once it is finished, until then of its steps."""
        whole = (self.result or {}).get("seconds")
        return float(whole) if isinstance(whole, int | float) else sum(value for _, value in self.series("time/step"))

    @property
    def phases(self) -> list[Phase]:
        found: list[Phase] = []
        start, rollouts_start = 0, 0.0
        for row, after in zip(self.rows, [*self.rows[1:], None], strict=True):
            if after is None or after.phase != row.phase or row.steps in self.reincarnations:
                found.append(Phase(row.phase, start, row.steps, rollouts_start, row.rollouts))
                start, rollouts_start = row.steps, row.rollouts
        return found

    @property
    def learns_from_groups(self) -> bool:
        """Whether responses to a prompt are compared with one another, so that equal rewards teach nothing."""
        rollout, advantage = (self.recipe.get(key) for key in ("rollout", "advantage"))
        alone = isinstance(rollout, Mapping) and rollout.get("group_size") == 1
        return not alone and not (isinstance(advantage, Mapping) and advantage.get("type") == "gae")

    def series(self, key: str) -> list[tuple[Row, float]]:
        """The steps that have a finite value of a metric, with it."""
        pairs = ((row, row.metrics.get(key)) for row in self.rows)
        return [(row, value) for row, value in pairs if value is not None]

    def exams(self) -> list[str]:
        """Names of the benchmarks or tasks evaluated; none where there is one nameless exam."""
        names = {name for evaluation in self.evaluations for name in evaluation.metrics}
        return sorted(match[1] for name in names if (match := re.fullmatch(r"eval/(.+)/pass@1", name)))


def read_run(path: Path) -> Run:
    """Raises ValueError, naming the cause and the remedy, for what is not the directory of a run with a step."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; name the run_dir of a run")
    if (path / "continual.json").exists():
        raise ValueError(
            f"{path}: a run of several tasks. Name one or more of its stages, such as {path / 'stages' / 'task=00'}; "
            f"`remix continual report {path}` says what was kept and forgotten"
        )
    logged = read_metrics(path)
    if not logged:
        there = (path / "metrics.jsonl").exists()
        raise ValueError(
            f"{path}: no training step has been logged yet; ask again once there is one"
            if there
            else f"{path}: no metrics.jsonl there, so this is not the directory of a run"
        )
    not_finite: dict[str, int] = {}
    rows = [_row(line, not_finite) for line in logged]
    state, result = _state(path), _json(path / "result.json")
    text = _text(path / "recipe.yaml")
    return Run(
        path=path,
        rows=rows,
        evaluations=[*_base(state, result), *_evaluations(rows)],
        reincarnations=_reincarnations(state, result),
        recipe=_recipe(text),
        recipe_text=text,
        result=result,
        completions=read_completions(path),
        not_finite=not_finite,
    )


def interval(evaluation: Evaluation, exam: str = "") -> Interval | None:
    """95% of a pass@1: Wilson's (1927) for one exam, the normal one for the mean over several. None where the number of
    problems is not known. Problems count once however many samples they have, so it is rather too wide than too narrow.
    """
    if exam:
        return _wilson(evaluation.metrics.get(f"eval/{exam}/pass@1"), evaluation.metrics.get(f"eval/{exam}/problems"))
    names = [name[: -len("/pass@1")] for name in evaluation.metrics if re.fullmatch(r"eval/(.+)/pass@1", name)]
    mean = evaluation.metrics.get(PASS_AT_1)
    if len(names) < 2:
        return _wilson(mean, evaluation.metrics.get(f"{names[0] if names else 'eval'}/problems"))
    shares = [(evaluation.metrics.get(f"{name}/pass@1"), evaluation.metrics.get(f"{name}/problems")) for name in names]
    known = [(share, count) for share, count in shares if share is not None and count]
    if mean is None or len(known) < len(names):
        return None
    half = Z * math.sqrt(sum(share * (1 - share) / count for share, count in known)) / len(known)
    return Interval(max(0.0, mean - half), min(1.0, mean + half))


def _wilson(share: float | None, count: float | None) -> Interval | None:
    if share is None or not count:
        return None
    centre, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def _row(line: Mapping[str, Any], not_finite: dict[str, int]) -> Row:
    steps = line["step"] + 1
    metrics: dict[str, float | None] = {}
    for name, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            metrics[name] = _finite(value)
            if metrics[name] is None:
                not_finite.setdefault(name, steps)
    return Row(steps, metrics.get("rollouts") or 0.0, str(line.get("phase", "")), metrics)


def _finite(value: float) -> float | None:
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number that no float holds
        return None


def _evaluations(rows: Sequence[Row]) -> Iterator[Evaluation]:
    for row in rows:
        found = {name: value for name, value in row.metrics.items() if name.startswith("eval/")}
        if found:
            yield Evaluation(row.steps, row.rollouts, found)


def _base(state: Mapping[str, Any], result: Mapping[str, Any] | None) -> list[Evaluation]:
    """The evaluation before the first step: a checkpoint has all of it, the result its pass@1."""
    found = state.get("base_evaluation")
    if not isinstance(found, dict):
        before = (result or {}).get("base_pass_at_1")
        found = {} if before is None else {PASS_AT_1: before}
    numbers = {name: _finite(value) for name, value in found.items() if isinstance(value, int | float)}
    return [Evaluation(0, 0.0, numbers)] if numbers else []


def _reincarnations(state: Mapping[str, Any], result: Mapping[str, Any] | None) -> list[int]:
    phase = state.get("phase")
    found = (result or {}).get("reincarnations", phase.get("reincarnations") if isinstance(phase, dict) else None)
    return [step for step in found if isinstance(step, int)] if isinstance(found, list) else []


def _state(path: Path) -> Mapping[str, Any]:
    """What the newest checkpoint says of the run."""
    state = (_json(path / "checkpoints" / "latest" / "state.json") or {}).get("state")
    return state if isinstance(state, dict) else {}


def _json(path: Path) -> dict[str, Any] | None:
    """None where there is none, or, as it is being replaced, no whole one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _recipe(text: str) -> Mapping[str, Any]:
    try:
        found = read_yaml(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
