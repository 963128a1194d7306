"""How docs/evidence.md looks, and what it reads off the curves of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Protocol

from matplotlib.figure import Figure

Run = Mapping[str, Any]
"""What is kept of a run: at each evaluation `rollouts`, `pass@1` (a share), `updates`, `seconds`, `entropy`, `length`,
`careful`; `by_lag`: means over the run; `failed`: the error that ended it, or absent."""
COSTS = ("rollouts", "updates", "seconds")
SHARES = (0.5, 0.75, 0.9, 1.0)
"""Of the on-policy gain."""

PAGE_TEXT = """# Rollouts to accuracy

ReMix ([arXiv 2507.06892](https://arxiv.org/abs/2507.06892)) against on-policy GRPO and PPO on the embedded arithmetic
tasks, every arm with the same budget of {budget:,} rollouts. pass@1 is sampled, on {prompts} held-out problems about
every {every:,} rollouts. An evaluation counts as the mean of itself and its two neighbours, the first and the last by
themselves; between evaluations curves are straight lines. The on-policy gain is what the tuned single-pass arm gains
over the base within the budget: its best evaluation, averaged over seeds. Costs are the median over seeds and, in
brackets, the range; a run that does not reach a target, or that failed, counts as beyond all that do (`not reached`).
Seconds leave evaluation out. Each arm is tuned by the same number of runs on sums of {first} and a seed that is not
measured: by rollouts to 90% of the gain, else by what was reached; the single-pass arm, which sets the gain, by what
was reached. Accuracies are in percent, mean ± standard deviation over the seeds that did not fail.

![pass@1 against rollouts](evidence.png)

{sections}
## What the page is made of

    {command}
    {command} --write-only

{present} of {wanted} runs are there{failed}; they took {hours:.1f} core-hours on {hardware}. A further run of the
command runs what is missing or failed.
{failures}"""


# --- reading runs -----------------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]], base: float | None) -> dict[str, Any]:
    """What `Run` says, of the lines of metrics.jsonl and the evaluation before them, if that is known."""
    updates = [*accumulate(row["updates"] for row in rows)]
    seconds = [*accumulate(row["time/step"] - row.get("time/evaluating", 0.0) for row in rows)]
    exams = [at for at, row in enumerate(rows) if "eval/pass@1" in row]
    before = [] if base is None else [base]
    at_zero = [0] * len(before)
    lags = sorted({int(key.split("lag=")[1]) for row in rows for key in row if key.startswith("ess/lag=")})

    def curve(key: str, digits: int) -> list[float]:
        return [round(rows[at][key], digits) for at in exams]

    def per_lag(key: str, lag: int) -> float:
        named = f"{key}/lag={lag}"
        return round(fmean(row[named] for row in rows if named in row), 4)

    ratios = ("ratio/mean", "ratio/p95", "clip_fraction", "ess")
    return {
        "rollouts": at_zero + [rows[at]["rollouts"] for at in exams],
        "updates": at_zero + [updates[at] for at in exams],
        "seconds": [*at_zero, *(round(seconds[at], 1) for at in exams)],
        "pass@1": [round(value, 4) for value in before] + curve("eval/pass@1", 4),
        "entropy": curve("entropy", 4),
        "length": curve("eval/response_length", 2),
        "careful": curve("eval/self_reflection", 4),
        "by_lag": {str(lag): {key: per_lag(key, lag) for key in ratios} for lag in lags},
        "took": round(sum(row["time/step"] for row in rows), 1),
    }


def smooth(values: Sequence[float]) -> list[float]:
    """Each the mean of itself and its neighbours, so that one lucky evaluation reaches no target and none is late; the
    ends as they are."""
    inner = [fmean(values[at - 1 : at + 2]) for at in range(1, len(values) - 1)]
    return [*values[:1], *inner, *values[1:][-1:]]


def finished(runs: Iterable[Run]) -> list[Run]:
    """Those that have a curve: all but failed ones."""
    return [run for run in runs if run["pass@1"]]


def within(run: Run, budget: float) -> int:
    """Evaluations up to the budget of rollouts, those before the first step among them."""
    return sum(rollouts <= budget for rollouts in run["rollouts"])


def best(run: Run, budget: float) -> float:
    return max(smooth(run["pass@1"])[: within(run, budget)])


def last(run: Run, budget: float) -> float:
    return smooth(run["pass@1"])[within(run, budget) - 1]


def cost_to(run: Run, target: float, cost: str, budget: float) -> float | None:
    """What the run had cost where its curve first reaches `target`; None: not within `budget` rollouts."""
    curve, costs, rollouts = smooth(run["pass@1"]), run[cost], run["rollouts"]
    for at, value in enumerate(curve):
        if value < target:
            continue
        part = 1.0 if at == 0 else (target - curve[at - 1]) / (value - curve[at - 1])
        before = max(at - 1, 0)
        if rollouts[before] + part * (rollouts[at] - rollouts[before]) > budget:
            return None
        return float(costs[before] + part * (costs[at] - costs[before]))
    return None


def middle(values: Sequence[float | None]) -> float | None:
    """The median, where None is beyond all numbers; None where it is not reached itself."""
    found = median([float("inf") if value is None else value for value in values]) if values else float("inf")
    return None if found == float("inf") else found


def collapse(run: Run) -> float | None:
    """Rollouts at which more than half of the best gain so far, of 5 points at least, is lost; None: never."""
    curve = smooth(run["pass@1"])
    base = top = curve[0]
    for value, rollouts in zip(curve, run["rollouts"], strict=True):
        top = max(top, value)
        if top - base >= 0.05 and value < (base + top) / 2:
            return float(rollouts)
    return None


# --- showing ------------------------------------------------------------------------------------------------------


def with_range(values: Sequence[float | None]) -> str:
    if not values:
        return "missing"
    reached = [value for value in values if value is not None]
    if not reached:
        return f"not reached (0 of {len(values)})"
    top = f"{max(reached):,.0f}" if len(reached) == len(values) else "not reached"
    at = middle(values)
    return f"{'not reached' if at is None else f'{at:,.0f}'} [{min(reached):,.0f}, {top}]"


def percent(values: Sequence[float]) -> str:
    if not values:
        return "missing"
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def ratio(of: Sequence[float | None], to: Sequence[float | None]) -> float | None:
    """Of medians; None where one is missing or not reached."""
    a, b = middle(of), middle(to)
    return None if a is None or not b else a / b


def verdict(value: float | None, bar: float, aim: float) -> list[str]:
    if value is None:
        return ["no ratio", "no", "no"]
    return [f"{value:.3f}", *("yes" if value <= most else "no" for most in (bar, aim))]


def ordering(statement: str, differences: Sequence[float]) -> list[str]:
    """`differences`, run by run over the same seeds: positive where the paper's ordering holds."""
    if len(differences) < 2:
        return [statement, "missing", "missing"]
    mean, error = fmean(differences), stdev(differences) / len(differences) ** 0.5
    holds = "undecided" if abs(mean) < 2 * error or mean == 0 else "yes" if mean > 0 else "no"
    return [statement, holds, f"{mean:+.4g} ± {error:.2g} ({len(differences)})"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def dynamics_row(name: str, runs: Sequence[Run], budget: float) -> list[str]:
    """Accuracy, how the policy changes, and what becomes of ratios at lags 0, 1 and the oldest that occurs."""
    runs = finished(runs)
    if not runs:
        return [name, "0", *["missing"] * 9]
    collapsed = [collapse(run) for run in runs]
    fell = [at for at in collapsed if at is not None]
    lags = sorted({int(lag) for run in runs for lag in run["by_lag"]})
    shown = sorted({*lags[:2], *lags[-1:]})

    def per_lag(key: str) -> str:
        means = (fmean([run["by_lag"][str(lag)][key] for run in runs if str(lag) in run["by_lag"]]) for lag in shown)
        return " / ".join(f"{lag}: {mean:.3f}" for lag, mean in zip(shown, means, strict=True))

    return [
        name,
        str(len(runs)),
        percent([best(run, budget) for run in runs]),
        percent([last(run, budget) for run in runs]),
        f"{fmean(run['entropy'][-1] for run in runs):.3f}",
        f"{fmean(min(run['length']) for run in runs):.1f} → {fmean(run['length'][-1] for run in runs):.1f}",
        percent([run["careful"][-1] for run in runs]),
        *(per_lag(key) for key in ("ratio/p95", "clip_fraction", "ess")),
        f"{len(fell)} of {len(runs)}" + (f", first at {min(fell):,.0f}" if fell else ""),
    ]


DYNAMICS_HEAD = [
    *("setting", "runs", "best pass@1", "last pass@1", "entropy", "length: least → last", "careful chains"),
    *("ratio p95 by lag", "clip fraction by lag", "ESS by lag", "collapsed"),
]


Arms = Mapping[str, Mapping[int, Run]]
"""Runs by seed, by the arm's name; "single pass", "best passes" and "ReMix" are compared, any others shown too."""


class HasArms(Protocol):
    @property
    def runs(self) -> Arms: ...
    @property
    def chosen(self) -> Mapping[str, Sequence[str] | None]: ...


def arms_section(title: str, of: HasArms, budget: float) -> str:
    """Costs to each target, the two comparisons, and the settings that were chosen."""
    head = f"## {title}\n\n"
    settings = [
        [name, "missing" if keys is None else " ".join(f"`{key}`" for key in keys)] for name, keys in of.chosen.items()
    ]
    chosen = "\n\nSettings beside the recipe's:\n\n" + table(["arm", "keys"], settings) + "\n"
    single = finished(of.runs["single pass"].values())
    if not single:
        return head + "The single-pass arm, which sets the targets, is missing." + chosen
    base, top = fmean(run["pass@1"][0] for run in single), fmean(best(run, budget) for run in single)
    costs, compared = [], []
    for share in SHARES:
        target = base + share * (top - base)
        by_arm = {
            name: {cost: [cost_to(run, target, cost, budget) for run in runs.values()] for cost in COSTS}
            for name, runs in of.runs.items()
        }
        shown = f"{share:.0%} ({100 * target:.1f})"
        costs += [
            [shown, name, str(len(by[COSTS[0]])), *(with_range(by[c]) for c in COSTS)] for name, by in by_arm.items()
        ]
        rollouts = {name: by["rollouts"] for name, by in by_arm.items()}
        for name in rollouts:
            for other, bar, aim in (("single pass", 1 / 5, 1 / 10), ("best passes", 2 / 3, 1 / 3)):
                if name not in ("single pass", "best passes"):
                    row = verdict(ratio(rollouts[name], rollouts[other]), bar, aim)
                    compared.append(
                        [shown, f"{name} / {other}", row[0], f"{bar:.3f}: {row[1]}", f"{aim:.3f}: {row[2]}"]
                    )
    reached = [
        [name, str(len(runs)), *(percent([of(run, budget) for run in finished(runs.values())]) for of in (best, last))]
        for name, runs in of.runs.items()
    ]
    parts = [
        f"Base {100 * base:.1f}, single-pass on-policy {100 * top:.1f}.",
        table(["arm", "runs", "best pass@1", "last pass@1"], reached),
        table(["target (pass@1)", "arm", "runs", "rollouts", "optimiser steps", "seconds"], costs),
        "Ratios of median rollouts:",
        table(["target (pass@1)", "arms", "ratio", "bar", "aim"], compared),
    ]
    return head + "\n\n".join(parts) + chosen


def dynamics_section(title: str, found: Arms, budget: float, picture: str | None = None) -> str:
    rows = [dynamics_row(name, [*runs.values()], budget) for name, runs in found.items()]
    note = (
        "Ratios are to the policy that sampled, clip fraction and ESS as trained on, each a mean over the run's steps."
    )
    shown = f"![pass@1 against rollouts]({picture})\n\n" if picture else ""
    return f"## {title}\n\n{shown}{note}\n\n{table(DYNAMICS_HEAD, rows)}\n"


def paired(a: Mapping[int, Run], b: Mapping[int, Run], of: Callable[[Run], float]) -> list[float]:
    """of(a) - of(b), over the seeds that both finished."""
    whole = (seed for seed in sorted(a.keys() & b.keys()) if finished([a[seed]]) and finished([b[seed]]))
    return [of(a[seed]) - of(b[seed]) for seed in whole]


def saving_rows(name: str, of: HasArms) -> list[list[str]]:
    """By the area under the curve up to the rollouts that both have: it is there where a target is not reached."""
    remix, single = of.runs["ReMix"], of.runs["single pass"]
    ends = [run["rollouts"][-1] for runs in (remix, single) for run in finished(runs.values())]
    until = min(ends, default=0)
    said = f"{name}: ReMix has a higher mean pass@1 over the budget than single-pass on-policy"
    return [ordering(said, paired(remix, single, lambda run: area(run, until)))]


def area(run: Run, until: float) -> float:
    """Mean pass@1 from 0 to `until` rollouts."""
    points = [*zip(run["rollouts"], run["pass@1"], strict=True)]
    total = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        end = min(x1, until)
        if end > x0:
            total += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return total / until


def ablation_rows(name: str, found: Arms, paper: Sequence[str], budget: float) -> list[list[str]]:
    """Neighbours in the paper's order."""
    return [
        ordering(f"{name}: {a} ends above {b}", paired(found[a], found[b], lambda run: last(run, budget)))
        for a, b in pairwise(paper)
    ]


def dynamics_rows(found: Arms, budget: float) -> list[list[str]]:
    few, many = found["p = 0.1"], found["p = 0.5"]
    return [
        ordering("p = 0.1 ends above p = 0.5", paired(few, many, lambda run: last(run, budget))),
        ordering("p = 0.5 has shorter responses than p = 0.1", paired(few, many, lambda run: min(run["length"]))),
        *(
            ordering(
                f"a decaying λ ends above {fixed}",
                paired(found["λ decays"], found[fixed], lambda run: last(run, budget)),
            )
            for fixed in ("λ = 1", "λ = 0.5")
        ),
        ordering(
            "without reincarnation, UTD 8 has fewer careful chains at the end than with it",
            paired(found["UTD 8"], found["T never, UTD 8"], lambda run: run["careful"][-1]),
        ),
    ]


def orderings_section(rows: Sequence[Sequence[str]]) -> str:
    note = "Differences over pairs of runs with one seed (mean ± standard error, pairs); undecided: within two errors."
    return f"## The paper's orderings\n\n{note}\n\n{table(['in the paper', 'holds here', 'difference'], rows)}\n"


def draw(panels: Mapping[str, Mapping[str, Sequence[Run]]], path: Path) -> None:
    """A panel for each title: the median curve over seeds of each arm and their range."""
    figure = Figure(figsize=(10.5, 4.0 * ((len(panels) + 1) // 2)), dpi=130, layout="constrained")
    grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False)
    for axes, (title, arms) in zip(grid.flat, panels.items(), strict=False):
        for number, (name, found) in enumerate(arms.items()):
            runs = finished(found)
            if not runs:
                continue
            length = min(len(run["pass@1"]) for run in runs)
            rollouts = [median(run["rollouts"][at] for run in runs) for at in range(length)]
            curves = [[100 * value for value in smooth(run["pass@1"])[:length]] for run in runs]
            at_each = [*zip(*curves, strict=True)]
            axes.plot(rollouts, [*map(median, at_each)], color=f"C{number}", label=name)
            axes.fill_between(
                rollouts, [*map(min, at_each)], [*map(max, at_each)], color=f"C{number}", alpha=0.15, lw=0
            )
        axes.set(title=title, xlabel="rollouts", ylabel="pass@1 (percent)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
