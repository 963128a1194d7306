"""How docs/evidence.md looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scripts.efficiency_arms import LRS, PASSES, REMIX, SINGLE
from scripts.efficiency_curves import (
    Arms,
    Measured,
    Run,
    area,
    best,
    collapse,
    cost_to,
    finished,
    gain_share,
    middle,
    paired,
    smooth,
    value_at,
)

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
measured: by rollouts to 90% of the gain there, among equals and else by what was reached; the single-pass arm, which
sets the gain, by what was reached, and then by rollouts among all that was tried. Accuracies are in percent, mean ±
standard deviation over the seeds that did not fail.

{picture}{sections}
{notes}## How it is measured

* Tuning and measuring are on the same {prompts} problems; the range over seeds is that of training. A response of an
  evaluation is sampled by a seed of its own that does not change from one evaluation to the next, so that their errors
  are alike.
* What an arm is not tuned in is as in its recipe: the critic's learning rate, λ's schedule, and T and N in steps
  whatever the batch. Ablation and dynamics are of the recipe's own ReMix with the learning rate that was chosen; those
  of λ with a weight of 0.01, ten times the recipe's.
* ReMix may choose several passes for its on-policy phase, which has one in the paper.

    {command}
    {command} --write-only

{present} of {wanted} runs are there{failed}, as far as choices are made; they took {hours:.1f} hours on {hardware}. A
further run of the command runs what is missing or failed.
{failures}"""


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


def compared(of: Sequence[float | None], to: Sequence[float | None], budget: float, most: Sequence[float]) -> list[str]:
    """The ratio of median rollouts, its 95% interval by resampling the runs of each arm, and whether it is within each
    of `most`. Where `to` is not reached, it is beyond the budget, and the ratio below what is shown."""
    a, b = middle(of), middle(to)
    if a is None or b == 0 or not of or not to:
        return ["no ratio", "", *("no" for _ in most)]
    rng = np.random.default_rng(0)
    tops, bottoms = (
        np.median(rng.choice([np.inf if v is None else v for v in values], (4000, len(values))), axis=1)
        for values in (of, to)
    )
    low, high = np.quantile(tops / np.minimum(bottoms, budget), [0.025, 0.975], method="nearest")
    value = a / (budget if b is None else b)
    shown = [f"{'' if b else '< '}{value:.3f}", f"[{low:.2f}, {'not reached' if np.isinf(high) else f'{high:.2f}'}]"]
    return [*shown, *("yes" if value <= bar else "no" if b else "unknown" for bar in most)]


T_QUANTILES = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31)
"""97.5% of Student's t, from 2 values on."""


def ordering(statement: str, differences: Sequence[float]) -> list[str]:
    """`differences`, run by run over the same seeds: positive where the paper's ordering holds."""
    if len(differences) < 2:
        return [statement, "missing", "missing"]
    mean, error = fmean(differences), stdev(differences) / len(differences) ** 0.5
    quantile = T_QUANTILES[min(len(differences), len(T_QUANTILES) + 1) - 2]
    holds = "undecided" if abs(mean) <= quantile * error else "yes" if mean > 0 else "no"
    return [statement, holds, f"{mean:+.3g} ± {error:.2g} ({len(differences)})"]


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
        percent([value_at(run, budget) for run in runs]),
        f"{fmean(run['entropy'][-1] for run in runs):.3f}",
        " → ".join(f"{fmean(of(run['length']) for run in runs):.1f}" for of in (lambda x: x[0], min, lambda x: x[-1])),
        percent([run["careful"][-1] for run in runs]),
        *(per_lag(key) for key in ("ratio/p95", "clip_fraction", "ess")),
        f"{len(fell)} of {len(runs)}" + (f", first at {min(fell):,.0f}" if fell else ""),
    ]


DYNAMICS_HEAD = [
    *("setting", "runs", "best pass@1", "last pass@1", "entropy", "length: base → least → last", "careful chains"),
    *("ratio p95 by lag", "clip fraction by lag", "ESS by lag", "collapsed"),
]


def arms_section(of: Measured, budget: float) -> str:
    """Costs to each target, the two comparisons, and the settings that were chosen."""
    settings = [[name, "missing" if keys is None else setting(keys)] for name, keys in of.chosen.items()]
    chosen = "\n\nSettings beside the recipe's:\n\n" + table(["arm", "keys"], settings) + "\n"
    single = finished(of.runs[SINGLE].values())
    if not single:
        return "The single-pass arm, which sets the targets, is missing." + chosen
    base, top = gain(single, budget)
    rise = fmean(value_at(run, budget) - value_at(run, 0.75 * budget) for run in single)
    costs, ratios = [], []
    for share in SHARES:
        target = gain_share(base, top, share)
        by_arm = {
            name: {cost: [cost_to(run, target, cost, budget) for run in runs.values()] for cost in COSTS}
            for name, runs in of.runs.items()
        }
        shown = f"{share:.0%} ({100 * target:.1f})"
        costs += [
            [shown, name, str(len(by[COSTS[0]])), *(with_range(by[c]) for c in COSTS)] for name, by in by_arm.items()
        ]
        rollouts = {name: by["rollouts"] for name, by in by_arm.items()}
        for name in (name for name in rollouts if name not in (SINGLE, PASSES)):
            for other, most in ((SINGLE, (1 / 5, 1 / 10)), (PASSES, (2 / 3, 1 / 3))):
                of_bars = compared(rollouts[name], rollouts[other], budget, most)
                held = (f"{bar:.3f}: {said}" for bar, said in zip(most, of_bars[2:], strict=True))
                ratios.append([shown, f"{name} / {other}", *of_bars[:2], *held])
    reached = [
        [
            name,
            str(len(runs)),
            *(percent([of(run, budget) for run in finished(runs.values())]) for of in (best, value_at)),
        ]
        for name, runs in of.runs.items()
    ]
    parts = [
        f"Base {100 * base:.1f}, single-pass on-policy {100 * top:.1f}, of which {100 * rise:.1f} in the last quarter.",
        table(["arm", "runs", "best pass@1", "last pass@1"], reached),
        table(["target (pass@1)", "arm", "runs", "rollouts", "optimiser steps", "seconds"], costs),
        "Ratios of median rollouts:",
        table(["target (pass@1)", "arms", "ratio", "95% interval", "bar", "aim"], ratios),
    ]
    return "\n\n".join(parts) + chosen


def gain(single: Sequence[Run], budget: float) -> tuple[float, float]:
    """pass@1 of the base and of the single-pass arm at its best, over runs that did not fail."""
    return fmean(run["pass@1"][0] for run in single), fmean(best(run, budget) for run in single)


def setting(keys: Sequence[str]) -> str:
    edges = [f"optimizer.lr={lr}" for lr in (LRS[0], LRS[-1])]
    return " ".join(f"`{key}`" + " (the grid's edge)" * (key in edges) for key in keys)


def dynamics_section(found: Arms, budget: float) -> str:
    rows = [dynamics_row(name, [*runs.values()], budget) for name, runs in found.items() if runs]
    note = (
        "Ratios and ESS are to the policy that sampled, the clip fraction is as trained on, each a mean over the steps "
        "that replay. Length and careful chains of the base are those of the first step's responses."
    )
    empty = [name for name, runs in found.items() if not runs]
    left = f"\nNot run yet: {'; '.join(empty)}.\n" if empty else ""
    return f"{note}\n\n{table(DYNAMICS_HEAD, rows)}\n{left}"


def beyond_section(
    of: Measured, found: Arms, taken_out: Iterable[str], controls: Mapping[str, str], budget: float
) -> str:
    """What options that are not the paper's add to the tuned ReMix; `controls`: what an option is compared with where
    it is not that."""
    gone = [name for name in taken_out if found[name]]
    single, remix = finished(of.runs[SINGLE].values()), of.runs[REMIX]
    if not single or not remix:
        return "The tuned ReMix, to which the options are added, is missing.\n"
    target = gain_share(*gain(single, budget), 0.9)
    until = shared_rollouts([remix, *found.values()])

    def costs(runs: Mapping[int, Run]) -> list[float | None]:
        return [cost_to(run, target, "rollouts", budget) for run in runs.values()]

    def row(name: str, runs: Mapping[int, Run]) -> list[str]:
        if runs is remix or name in controls.values():
            return [name, "", "", with_range(costs(runs)), "", ""]
        base = found[controls[name]] if name in controls else remix
        return [
            *ordering(name, paired(runs, base, lambda run: 100 * area(run, until))),
            with_range(costs(runs)),
            *compared(costs(runs), costs(base), budget, ()),
        ]

    rows = [row(name, runs) for name, runs in {"ReMix itself": remix, **found}.items() if runs]
    others = [f"{name}, with {control}" for name, control in controls.items() if found.get(name)]
    note = (
        "Each option is added to the tuned ReMix and compared with it: points of mean pass@1 over the budget, by pairs "
        f"of runs with one seed, and rollouts to 90% of the on-policy gain ({100 * target:.1f})."
        + (f" Held-out problems are others, and the comparison is of {'; '.join(others)}." if others else "")
        + (f" Tried, and not in recipes since they lowered nothing: {'; '.join(gone)}." if gone else "")
    )
    columns = ["option", "higher", "difference (pairs)", "rollouts", "ratio of medians", "95% interval"]
    return f"{note}\n\n{table(columns, rows)}\n"


def shared_rollouts(arms: Iterable[Mapping[int, Run]]) -> float:
    """Up to which all runs have been evaluated."""
    return min((run["rollouts"][-1] for runs in arms for run in finished(runs.values())), default=0)


def saving_rows(name: str, of: Measured) -> list[list[str]]:
    """By the area under the curve up to the rollouts that both have: it is there where a target is not reached."""
    remix, until = of.runs[REMIX], shared_rollouts(of.runs.values())
    return [
        ordering(
            f"{name}: ReMix has a higher mean pass@1 over the budget than on-policy with its {other}",
            paired(remix, of.runs[other], lambda run: 100 * area(run, until)),
        )
        for other in (SINGLE, PASSES)
    ]


def ablation_rows(name: str, found: Arms, paper: Sequence[str], budget: float) -> list[list[str]]:
    """The full method against the others, then neighbours in the paper's order."""
    full, *rest = paper
    return [
        ordering(f"{name}: {a} ends above {b}", paired(found[a], found[b], lambda run: 100 * value_at(run, budget)))
        for a, b in [*((full, other) for other in rest), *pairwise(rest)]
    ]


def dynamics_rows(found: Arms, budget: float) -> list[list[str]]:
    few, many = found["p = 0.1"], found["p = 0.5"]

    def early(run: Run) -> float:
        return 100 * value_at(run, budget / 4)

    return [
        ordering("p = 0.5 is above p = 0.1 at a quarter of the budget", paired(many, few, early)),
        ordering("p = 0.1 ends above p = 0.5", paired(few, many, lambda run: 100 * value_at(run, budget))),
        ordering("p = 0.5 has shorter responses than p = 0.1", paired(few, many, lambda run: min(run["length"]))),
        ordering(
            "a decaying λ ends above λ = 0.5",  # above λ = 1: the ablation without KL-Convex, of more seeds
            paired(found["λ decays"], found["λ = 0.5"], lambda run: 100 * value_at(run, budget)),
        ),
        ordering(
            "without reincarnation, UTD 8 has fewer careful chains at the end than with it",
            paired(found["UTD 8"], found["T never, UTD 8"], lambda run: 100 * run["careful"][-1]),
        ),
    ]


def orderings_section(rows: Sequence[Sequence[str]]) -> str:
    note = (
        f"{len(rows)} differences over pairs of runs with one seed (mean ± standard error, pairs), in points or, of "
        "lengths, in tokens; undecided: 0 is within the 95% interval, of one comparison by itself. The paper's "
        "ablation is of PPO."
    )
    return f"{note}\n\n{table(['in the paper', 'holds here', 'difference'], rows)}\n"


def join(sections: Mapping[str, tuple[Any, str]]) -> str:
    """By title; of those that nothing has been run for, the titles alone."""
    empty = [title for title, (runs, _) in sections.items() if not any(runs)]
    there = [f"## {title}\n\n{text}" for title, (runs, text) in sections.items() if any(runs)]
    return "\n".join([*there, f"Not run yet: {'; '.join(empty)}.\n"] if empty else there)


def draw(panels: Mapping[str, Arms], path: Path) -> str:
    """A panel for each title that has runs: the median curve over seeds of each arm and their range. Returns the
    picture's line for the page, empty where there is nothing to draw."""
    panels = {title: arms for title, arms in panels.items() if any(finished(r.values()) for r in arms.values())}
    if not panels:
        return ""
    figure = Figure(figsize=(10.5, 4.0 * ((len(panels) + 1) // 2)), dpi=130, layout="constrained")
    grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False)
    for axes, (title, arms) in zip(grid.flat, panels.items(), strict=False):
        for number, (name, found) in enumerate(arms.items()):
            runs = finished(found.values())
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
        axes.legend(frameon=False, fontsize=8)
    for axes in [*grid.flat][len(panels) :]:
        axes.remove()
    figure.savefig(path)
    return f"![pass@1 against rollouts]({path.name})\n\n"
