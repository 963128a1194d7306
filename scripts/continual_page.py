"""How docs/continual.md looks: its words, tables and picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

PAGE_TEXT = """# Continual learning on `shapes`

Six tasks about small pictures, or ten, learnt one after the other by a LoRA each on the embedded vision-language model
(supervised, `recipes/embedded/continual_shapes_sft.yaml`), pass@1 in percent on held-out pictures, greedy. ACC is the
mean over all tasks after the last, BWT what later tasks did to earlier ones, both as in PAM
([arXiv 2506.03189](https://arxiv.org/abs/2506.03189)). Mean ± standard deviation over runs: three orders, up to
{seeds} seeds each. `independent` has an adapter for every task and is no method of continual learning but what
forgetting is measured against; `PAM + TALL` has to be told the task at hand.

![ACC against BWT](continual.png)

`running average` is PAM without alignment, g ← (g + w)/2 as tasks come; `running mean` is g ← g + (w − g)/t. `average`
and `TIES` merge adapters that were trained apart, `MagMax` adapters each trained from the one before. `PAM by change`
takes the entries that have changed most since the start for the important ones, `PAM on B alone` aligns one factor of
each LoRA.

In the first three regimes below each task is learnt about as well by itself; the first two differ in how far it moves
the adapter, and so in what it does to the other tasks; the third has more tasks. In the last two the base knows less of
what is asked: most of what it was taught, or all of it, were captions, so that adapters of single tasks, averaged
afterwards, have less to build on. In all of them settings are chosen by ACC on another order and another seed than
those measured: one rank for all methods, by their mean, where several were tried; then each method's own, of as many as
the last column says. LoRAs are on every linear layer.

ACC, with its standard deviation over orders, and BWT:

{overview}

As in the paper, PAM is above sequential training in the mean over orders and hangs less on the order. With six tasks it
is not above it in every order; with ten it is, and above merging afterwards. That comes of averaging as tasks come:
wherever the two were compared, alignment's own share of ACC is within two standard errors of nothing. Which average is
better depends on what the base knows. The fourth regime was looked for: its share of captions is the one of three that
showed PAM at its best on the order that settings are chosen on.

{orders}

{regimes}
The page is written by `python scripts/study_continual.py`; its runs took {minutes} minutes of one core.
"""

SECTION_TEXT = """## {name}

{says}; {rank}.

{scores}

By order, means over seeds:

{by_order}

Whether PAM is where it was expected, by the means of each order:

{bars}

What makes the difference, over pairs of runs with the same order and seed (mean ± standard error):

{paired}

Settings:

{settings}
"""


Points = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Values of ACC and BWT, by method."""

OVERVIEW = ("sequential", "average", "TIES", "running average", "running mean", "PAM")
IN_PAPER = ["the paper's: CoIN, PaliGemma", "43.4 ± 8.2 / -39.5", "", "47.8 / -22.9", "", "", "49.9 ± 1.7 / -19.5"]
"""Three orders there too; its TIES is averaging and TIES."""


def overview(regimes: Mapping[str, Points]) -> str:
    """Of each regime the methods of OVERVIEW, by the means of each order."""

    def cell(acc: Sequence[float], bwt: Sequence[float]) -> str:
        return f"{spread(acc)} / {fmean(bwt):+.1f}"

    rows = [
        [name, *(cell(*points[method]) if method in points else "" for method in OVERVIEW)]
        for name, points in regimes.items()
    ]
    return table(["regime", *OVERVIEW], [*rows, IN_PAPER])


def draw(regimes: Mapping[str, Points], path: Path) -> None:
    """A panel for each regime, a method a point with its standard deviations."""
    figure = Figure(figsize=(10.5, 3.6 * ((len(regimes) + 1) // 2)), dpi=150, layout="constrained")
    panels = figure.subplots((len(regimes) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False)
    named = {}
    for axes in panels.flat[len(regimes) :]:
        axes.set_axis_off()
    for axes, (name, points) in zip(panels.flat, regimes.items(), strict=False):
        for number, (method, (acc, bwt)) in enumerate(points.items()):
            if not acc:
                continue
            style = {"fmt": "o" if number < 10 else "s", "color": f"C{number % 10}", "capsize": 2, "elinewidth": 0.8}
            spread_of = {"xerr": stdev(bwt), "yerr": stdev(acc)} if len(acc) > 1 else {}
            named[method] = axes.errorbar(fmean(bwt), fmean(acc), **spread_of, **style)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelbottom=True)  # also where the panel below is empty
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.supxlabel("BWT (points; right: less forgotten)", fontsize=10)
    figure.supylabel("ACC (percent)", fontsize=10)
    figure.legend(named.values(), named, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def difference(values: Sequence[float]) -> str:
    """Mean and standard error."""
    return f"{fmean(values):+.1f}" + (f" ± {stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
