"""Several runs side by side: those that differ in nothing but the seed are one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

from remix.reporting.runs import PASS_AT_1, Run

NOT_THE_RECIPE = {"seed", "run_dir", "max_steps", "checkpoint", "faults", "log"}
"""Keys in which runs of one line may differ."""
TARGETS = (0.5, 0.75, 0.9, 1.0)
"""Shares of the gain."""
MOST_POINTS = 400
"""Of a curve; more than a screen can show apart."""


class Point(NamedTuple):
    """Of a curve."""

    steps: float
    rollouts: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    label: str
    runs: Sequence[Run]


class Reached(NamedTuple):
    """What one line took to reach one target."""

    rollouts: Sequence[float]
    """Of each of its runs that reached it, ascending."""
    of: int
    """Runs."""

    @property
    def median(self) -> float | None:
        """None unless most runs have reached it: those that have not count as infinitely many."""
        ordered = [*self.rollouts, *[float("inf")] * (self.of - len(self.rollouts))]
        middle = median(ordered)
        return None if middle == float("inf") else middle


class Targets(NamedTuple):
    base: float
    """pass@1 before training, mean over all runs."""
    best: float
    """The highest mean pass@1 of the first line: 100% of the gain."""
    levels: Sequence[float]
    """pass@1 at each of TARGETS."""
    reached: Sequence[Sequence[Reached]]
    """By line, by target."""


def group(runs: Sequence[Run]) -> list[Line]:
    """Lines in the order in which their first runs come."""
    found: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        science = flat(run.recipe)
        same = next((members for other, members in found if run.recipe and other == science), None)
        if same is None:
            found.append((science, [run]))
        else:
            same.append(run)
    labels = _labels([(science, members[0]) for science, members in found])
    return [Line(label, members) for label, (_, members) in zip(labels, found, strict=True)]


def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a recipe and their values, without those that runs of one line may differ in."""
    return _flat({key: value for key, value in recipe.items() if key not in NOT_THE_RECIPE}, "")


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted keys that do not have the same value in all."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [key for key in keys if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)]


def band(line: Line, points: Callable[[Run], Sequence[Point]]) -> list[Point]:
    """The mean over a line's runs with the least and the greatest, at the steps that all of them have."""
    curves = [{point.steps: point for point in points(run)} for run in line.runs]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(curves) == 1:
        return [curves[0][step] for step in common]
    found = []
    for step in common:
        at = [curve[step] for curve in curves]
        values = [point.value for point in at]
        found.append(Point(step, fmean(point.rollouts for point in at), fmean(values), min(values), max(values)))
    return found


def accuracy(run: Run) -> list[Point]:
    """pass@1 at every evaluation, that before the first step included."""
    found = [(evaluation, evaluation.metrics.get(PASS_AT_1)) for evaluation in run.evaluations]
    return [Point(at.steps, at.rollouts, value) for at, value in found if value is not None]


def rollouts_to(curve: Sequence[Point], target: float) -> float | None:
    """The rollouts after which a curve first is at `target`, on a straight line from the evaluation before."""
    for before, after in zip([None, *curve], curve, strict=False):
        if after.value >= target:
            if before is None:
                return after.rollouts
            share = (target - before.value) / (after.value - before.value)
            return before.rollouts + share * (after.rollouts - before.rollouts)
    return None


def targets(lines: Sequence[Line]) -> Targets | None:
    """None where nothing is to be said: without an evaluation before and one after, or without a gain."""
    curves = [[accuracy(run) for run in line.runs] for line in lines]
    starts = [curve[0].value for of_line in curves for curve in of_line if curve and curve[0].steps == 0]
    best = max((point.value for point in band(lines[0], accuracy) if point.steps), default=None)
    if not starts or best is None or best <= fmean(starts):
        return None
    base = fmean(starts)
    levels = [base + share * (best - base) for share in TARGETS]
    reached = []
    for of_line in curves:
        found = [[rollouts_to(curve, level) for curve in of_line] for level in levels]
        reached.append([Reached(sorted(r for r in of if r is not None), len(of)) for of in found])
    return Targets(base, best, levels, reached)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points, each the mean of neighbours, and their last step; bands as wide as their widest."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    found = []
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        lows = [point.low for point in chunk if point.low is not None]
        highs = [point.high for point in chunk if point.high is not None]
        found.append(
            chunk[-1]._replace(
                value=fmean(point.value for point in chunk),
                low=min(lows, default=None),
                high=max(highs, default=None),
            )
        )
    return found


def algorithm(recipe: Mapping[str, Any]) -> str:
    """What a recipe trains by, as one would call it; "" where it does not say."""
    phases, objective, advantage = (recipe.get(key) for key in ("phases", "objective", "advantage"))
    if isinstance(objective, Mapping) and objective.get("type") == "sft":
        return "SFT"
    kind = advantage.get("type") if isinstance(advantage, Mapping) else None
    if not isinstance(kind, str):
        return ""
    name = {"gae": "PPO", "dr_grpo": "Dr. GRPO"}.get(kind, kind.upper())
    mixes = isinstance(phases, list) and any(
        isinstance(phase, Mapping) and phase.get("type") == "mix_policy" for phase in phases
    )
    return f"ReMix-{name}" if mixes else name


def _labels(lines: Sequence[tuple[dict[str, Any], Run]]) -> list[str]:
    """The algorithm; where several have the same, with what they differ in; at last, with the directory."""
    names = [algorithm(run.recipe) or run.name for _, run in lines]
    found = []
    for name, (science, run) in zip(names, lines, strict=True):
        rivals = [other for rival, (other, _) in zip(names, lines, strict=True) if rival == name]
        keys = differing(rivals)
        if len(rivals) > 1:
            short = [f"{key.rpartition('.')[2]} {science.get(key, 'unset')}" for key in keys]
            name = f"{name}, {', '.join(short) if 0 < len(short) <= 2 else run.name}"
        found.append(name)
    doubled = len(set(found)) < len(found)
    return [f"{label} ({run.path})" for label, (_, run) in zip(found, lines, strict=True)] if doubled else found


def _flat(block: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(block, Mapping | list) or not block:
        return {prefix: block}
    items = block.items() if isinstance(block, Mapping) else enumerate(block)
    return {
        name: value
        for key, inner in items
        for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }
