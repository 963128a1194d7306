"""What methods of continual learning keep of six tasks: orders x seeds x methods, and the page that shows it.

    python scripts/study_continual.py                      # runs what is missing, then writes the page
    python scripts/study_continual.py --write-only         # the page from the runs that are there

Every cell is a run of recipes/embedded/continual_shapes_sft.yaml with other keys, in `--out`; a cell that is done is
not run again, and one that was interrupted goes on. Settings of a method are chosen among its few by ACC on runs of
their own (another order, another seed) before it is measured, as many for each. All numbers of the page come from the
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RECIPE = ROOT / "recipes" / "embedded" / "continual_shapes_sft.yaml"
PAGE = ROOT / "docs" / "continual.md"

ORDERS = {
    "A": ("colour", "odd", "where", "smaller", "bigger", "left"),
    "B": ("left", "bigger", "smaller", "where", "odd", "colour"),
    "C": ("where", "left", "smaller", "colour", "odd", "bigger"),
}
TUNING_ORDER = ("odd", "bigger", "colour", "left", "where", "smaller")
TUNING_SEED = 1000

Settings = dict[str, Any]
PAM: Settings = {"method": {"type": "pam"}}


def pam(**alignment: Any) -> Settings:
    return {"method": {"type": "pam", "alignment": alignment}}


METHODS: dict[str, tuple[Settings, ...]] = {
    "independent": tuple({"method": {"type": "independent"}, "rank": rank} for rank in (8, 16)),
    "sequential": tuple({"method": {"type": "sequential"}, "rank": rank} for rank in (8, 16)),
    "replay": tuple({"method": {"type": "replay", "share": share}} for share in (0.3, 0.5)),
    "average": tuple({"method": {"type": "average", "form": form}} for form in ("factors", "delta")),
    "average in sequence": tuple(
        {"method": {"type": "average", "start": "previous"}, "rank": rank} for rank in (8, 16)
    ),
    "TIES": tuple({"method": {"type": "ties", "density": density, "form": "delta"}} for density in (0.2, 0.5)),
    "MagMax": tuple({"method": {"type": "magmax"}, "rank": rank} for rank in (8, 16)),
    "running average": tuple({"method": {"type": "pam", "alignment": None}, "rank": rank} for rank in (8, 16)),
    "PAM": (pam(share=0.5), pam(share=0.75)),
    "PAM, |g - init|": (pam(share=0.5, importance="change"), pam(share=0.75, importance="change")),
    "PAM, B alone": (pam(share=0.5, factors=["B"]), pam(share=0.75, factors=["B"])),
    "PAM + TALL": tuple({"method": {"type": "pam+tall", "threshold": threshold}} for threshold in (0.2, 0.4)),
}
"""What each may choose from: two settings, so that none is tuned more than another."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    name: str
    order: tuple[str, ...]
    seed: int
    settings: Settings

    def run_dir(self, out: Path) -> Path:
        return out / self.name


def overrides(cell: Cell, out: Path) -> list[str]:
    rank = cell.settings.get("rank", 16)
    return [
        f"run_dir={cell.run_dir(out)}",
        f"seed={cell.seed}",
        f"adapter.rank={rank}",
        f"adapter.alpha={2 * rank}",
        f"continual.order={json.dumps(list(cell.order))}",
        f"continual.method={json.dumps(cell.settings['method'])}",
    ]


def run_cell(cell: Cell, out: str) -> dict[str, Any]:
    """In a process of its own; the result of one that is done is read."""
    from remix.config import load_recipe
    from remix.train import run

    folder = cell.run_dir(Path(out))
    done = folder / "result.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            run(
                load_recipe(RECIPE, overrides(cell, Path(out))),
                str(RECIPE),
                resume=(folder / "continual.json").exists(),
            )
    result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return result


def run_all(cells: Sequence[Cell], out: Path, jobs: int) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = {cell.name: pool.submit(run_cell, cell, str(out)) for cell in cells}
        for number, (name, future) in enumerate(futures.items(), 1):
            results[name] = future.result()
            shown = ", ".join(f"{key} {100 * results[name][key]:.1f}" for key in ("ACC", "BWT"))
            print(f"{number}/{len(cells)}  {name}: {shown}", flush=True)
    return results


def tuning_cells() -> Iterator[Cell]:
    for method, choices in METHODS.items():
        for index, settings in enumerate(choices):
            yield Cell(f"tuning/{slug(method)}-{index}", TUNING_ORDER, TUNING_SEED, settings)


def tuned(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Settings]:
    """By ACC; the first of equals."""

    def acc(method: str, index: int) -> float:
        return float(results[f"tuning/{slug(method)}-{index}"]["ACC"])

    return {
        method: choices[max(range(len(choices)), key=lambda index: (acc(method, index), -index))]
        for method, choices in METHODS.items()
    }


def measured_cells(chosen: Mapping[str, Settings], seeds: int) -> Iterator[Cell]:
    for seed in range(seeds):
        for name, order in ORDERS.items():
            for method in METHODS:
                yield Cell(f"{slug(method)}/{name}-{seed}", order, seed, chosen[method])


def slug(method: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in method.lower()).strip("-")


# --- the page -----------------------------------------------------------------------------------------------------


def write_page(results: Mapping[str, Mapping[str, Any]], chosen: Mapping[str, Settings], seeds: int) -> None:
    """docs/continual.md and docs/continual.png."""

    def values(method: str, key: str, orders: Iterable[str] = ORDERS) -> list[float]:
        return [100 * results[f"{slug(method)}/{order}-{seed}"][key] for order in orders for seed in range(seeds)]

    rows = [
        [method, *(spread(values(method, key)) for key in ("ACC", "BWT", "forgetting", "zero_shot"))]
        for method in METHODS
    ]
    by_order = [
        [
            method,
            *(f"{fmean(values(method, 'ACC', [o])):.1f} / {fmean(values(method, 'BWT', [o])):+.1f}" for o in ORDERS),
        ]
        for method in METHODS
    ]
    pairs = [
        ("running average", "sequential"),
        ("PAM", "sequential"),
        ("PAM", "running average"),
        ("PAM, |g - init|", "running average"),
        ("PAM, B alone", "running average"),
        ("PAM", "average"),
        ("PAM", "average in sequence"),
        ("PAM", "TIES"),
    ]
    paired = [[f"{a} − {b}", *(difference(values(a, key), values(b, key)) for key in ("ACC", "BWT"))] for a, b in pairs]
    settings = [[method, *(f"`{json.dumps(value)}`" for value in (chosen[method],))] for method in METHODS]
    orders = [[name, ", ".join(order)] for name, order in ORDERS.items()]
    minutes = sum(result["seconds"] for result in results.values()) / 60
    count = len(ORDERS) * seeds
    PAGE.parent.mkdir(exist_ok=True)
    draw({method: (values(method, "ACC"), values(method, "BWT")) for method in METHODS}, PAGE.with_suffix(".png"))
    PAGE.write_text(
        PAGE_TEXT.format(
            scores=table(["method", "ACC", "BWT", "forgetting", "zero-shot"], rows),
            by_order=table(["method", *(f"{name}: ACC / BWT" for name in ORDERS)], by_order),
            paired=table(["difference", "ACC", "BWT"], paired),
            settings=table(["method", "settings"], settings),
            orders=table(["order", "tasks"], orders),
            cells=count,
            seeds=seeds,
            minutes=f"{minutes:.0f}",
        ),
        encoding="utf-8",
    )


PAGE_TEXT = """# Continual learning on `shapes`

Six tasks about small pictures, learnt one after the other by a LoRA each on the embedded vision-language model
(supervised, `recipes/embedded/continual_shapes_sft.yaml`), pass@1 in percent on held-out pictures, greedy. ACC is the
mean over all tasks after the last, BWT what later tasks did to earlier ones, both as in PAM
([arXiv 2506.03189](https://arxiv.org/abs/2506.03189)). Mean ± standard deviation over {cells} runs a method: three
orders × {seeds} seeds. `independent` has an adapter for every task and is no method of continual learning but what
forgetting is measured against; `PAM + TALL` has to be told the task at hand.

![ACC against BWT](continual.png)

{scores}

By order, means over seeds:

{by_order}

What makes the difference, over pairs of runs with the same order and seed (mean ± standard error):

{paired}

`running average` is PAM without alignment: g ← (g + w)/2 as tasks come. `average` and `TIES` merge adapters that were
trained apart; `average in sequence` and `MagMax` merge adapters each trained from the one before.

## Settings

Every method chose between two settings, by ACC on one run of another order ({seeds} other seeds left alone):

{settings}

{orders}

The page is written by `python scripts/study_continual.py`; its runs took {minutes} minutes of one core.
"""


def draw(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, (method, (acc, bwt)) in enumerate(points.items()):
        colour = f"C{number % 10}"
        marker = "o" if number < 10 else "s"
        spread_of = {"xerr": stdev(bwt), "yerr": stdev(acc)} if len(acc) > 1 else {}
        axes.errorbar(
            fmean(bwt), fmean(acc), **spread_of, fmt=marker, color=colour, label=method, capsize=2, elinewidth=0.8
        )
    axes.set_xlabel("BWT (points; right: less forgotten)")
    axes.set_ylabel("ACC (percent)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}"
    return f"{fmean(differences):+.1f} ± {stdev(differences) / len(differences) ** 0.5:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study_continual")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out = options.out.resolve()

    def results_of(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        if not options.write_only:
            return run_all(cells, out, options.jobs)
        return {cell.name: json.loads((cell.run_dir(out) / "result.json").read_text("utf-8")) for cell in cells}

    tuning = results_of(list(tuning_cells()))
    chosen = tuned(tuning)
    results = results_of(list(measured_cells(chosen, options.seeds)))
    write_page(results | tuning, chosen, options.seeds)
    print(PAGE)


if __name__ == "__main__":
    main()
