"""What the study of rollouts to accuracy keeps of a run, and what it reads off the curves of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import Any

import numpy as np

Run = Mapping[str, Any]
"""What is kept of a run: of the base and at each evaluation `rollouts`, `pass@1` (a share), `updates`, `seconds`,
`entropy`, `length`, `careful`; `by_lag`: means over the steps that replay, over all where none does; `failed`: the
error that ended it, or absent; `took`: all its seconds, on `machine`."""
Arms = Mapping[str, Mapping[int, Run]]
"""Runs by seed, by the arm's or the setting's name."""


@dataclass(frozen=True)
class Measured:
    """The arms of an algorithm on a task: their chosen keys, None where tuning is not done, and their runs."""

    chosen: Mapping[str, tuple[str, ...] | None]
    runs: Arms


def summary(rows: Sequence[Mapping[str, Any]], base: float) -> dict[str, Any]:
    """What `Run` says of the curve, by the lines of metrics.jsonl and the evaluation before them."""
    updates = [*accumulate(row.get("updates", 0) for row in rows)]  # none where all groups had equal rewards
    seconds = [*accumulate(row["time/step"] - row.get("time/evaluating", 0.0) for row in rows)]
    exams = [at for at, row in enumerate(rows) if "eval/pass@1" in row]
    replaying = [row for row in rows if row["phase"] == "mix_policy"] or rows
    lags = sorted({int(key.split("lag=")[1]) for row in replaying for key in row if key.startswith("ess/lag=")})
    entropy = [*accumulate((row.get("entropy") for row in rows), lambda last, now: last if now is None else now)]

    def curve(first: str, key: str, digits: int) -> list[float]:
        """Of the base, by what it sampled in the first step, and of each evaluation."""
        return [round(value, digits) for value in (rows[0][first], *(rows[at][key] for at in exams))]

    def per_lag(key: str, lag: int) -> float:
        named = f"{key}/lag={lag}"
        return round(fmean(row[named] for row in replaying if named in row), 4)

    ratios = ("ratio/mean", "ratio/p95", "clip_fraction", "ess")
    return {
        "rollouts": [0, *(rows[at]["rollouts"] for at in exams)],
        "updates": [0, *(updates[at] for at in exams)],
        "seconds": [0, *(round(seconds[at], 1) for at in exams)],
        "pass@1": [round(value, 4) for value in (base, *(rows[at]["eval/pass@1"] for at in exams))],
        "entropy": [round(entropy[at], 4) for at in (0, *exams)],
        "length": curve("response/length", "eval/response_length", 2),
        "careful": curve("response/self_reflection", "eval/self_reflection", 4),
        "by_lag": {str(lag): {key: per_lag(key, lag) for key in ratios} for lag in lags},
    }


def smooth(values: Sequence[float]) -> list[float]:
    """Each the mean of itself and its neighbours, so that one lucky evaluation reaches no target and none is late; the
    ends as they are."""
    inner = [fmean(values[at - 1 : at + 2]) for at in range(1, len(values) - 1)]
    return [*values[:1], *inner, *values[1:][-1:]]


def finished(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if "failed" not in run]


def value_at(run: Run, rollouts: float) -> float:
    """Of the smoothed curve, that of the last evaluation beyond its end."""
    return float(np.interp(rollouts, run["rollouts"], smooth(run["pass@1"])))


def best(run: Run, budget: float) -> float:
    """Up to the budget, at which the curve is cut."""
    before = [value for at, value in zip(run["rollouts"], smooth(run["pass@1"]), strict=True) if at <= budget]
    return max(*before, value_at(run, budget))


def gain_share(base: float, reached: float, share: float) -> float:
    return base + share * (reached - base)


def cost_to(run: Run, target: float, cost: str, budget: float) -> float | None:
    """What the run had cost where its curve first reaches `target`; None: not within `budget` rollouts, or failed."""
    curve = [] if "failed" in run else smooth(run["pass@1"])
    at = next((at for at, value in enumerate(curve) if value >= target), None)
    if at is None:
        return None
    stretch = slice(max(at - 1, 0), at + 1)
    rollouts, spent = (float(np.interp(target, curve[stretch], run[of][stretch])) for of in ("rollouts", cost))
    return None if rollouts > budget else spent


def middle(values: Sequence[float | None]) -> float | None:
    """The median, where None is beyond all numbers; None where it is not reached itself."""
    found = median([np.inf if value is None else value for value in values] or [np.inf])
    return None if found == np.inf else found


def collapse(run: Run) -> float | None:
    """Rollouts at which more than half of the best gain so far, of 5 points at least, is lost; None: never."""
    curve = smooth(run["pass@1"])
    base = top = curve[0]
    for value, rollouts in zip(curve, run["rollouts"], strict=True):
        top = max(top, value)
        if top - base >= 0.05 and value < (base + top) / 2:
            return float(rollouts)
    return None


def area(run: Run, until: float) -> float:
    """Mean pass@1 from 0 to `until` rollouts."""
    points = [*zip(run["rollouts"], run["pass@1"], strict=True)]
    total = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        end = min(x1, until)
        if end > x0:
            total += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return total / until


def paired(a: Mapping[int, Run], b: Mapping[int, Run], of: Callable[[Run], float]) -> list[float]:
    """of(a) - of(b), over the seeds that both finished."""
    whole = (seed for seed in sorted(a.keys() & b.keys()) if finished([a[seed]]) and finished([b[seed]]))
    return [of(a[seed]) - of(b[seed]) for seed in whole]
