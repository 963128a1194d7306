"""What methods of continual learning keep of six tasks: regimes x orders x seeds x methods, and the page that shows it.

    python scripts/study_continual.py                      # runs what is missing, then writes the page
    python scripts/study_continual.py --write-only         # the page from what there is of docs/continual.json and runs

Every cell is a run of recipes/embedded/continual_shapes_sft.yaml with other keys, in `--out`; a cell that is done is
not run again, and one that was interrupted goes on. In each regime one rank for all methods and then each method's
settings are chosen by ACC on another order and another seed before anything is measured. All numbers of the page come
from the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.continual_page import OVERVIEW, PAGE_TEXT, SECTION_TEXT, difference, draw, overview, spread, table
from scripts.processes import in_processes

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "embedded" / "continual_shapes_sft.yaml"
PAGE = ROOT / "docs" / "continual.md"
SUMMARIES = PAGE.with_suffix(".json")
"""What came of every run: those that are in it are not run again."""

ORDERS = {
    "A": ("colour", "odd", "where", "smaller", "bigger", "left"),
    "B": ("left", "bigger", "smaller", "where", "odd", "colour"),
    "C": ("where", "left", "smaller", "colour", "odd", "bigger"),
}
WIDE = ("left", "count", "smaller", "point", "colour", "digit", "bigger", "shape", "odd", "where")
WIDE_ORDERS = {
    "A": WIDE,
    "B": WIDE[::-1],
    "C": ("digit", "where", "bigger", "colour", "left", "odd", "count", "smaller", "shape", "point"),
}
"""All ten kinds."""
VARIANTS = ("running mean", "PAM, running mean", "PAM by change", "PAM on B alone")
"""Measured after the others."""
TUNING_ORDER = ("odd", "bigger", "colour", "left", "where", "smaller")
TUNING_SEED = 1000
SIZE = 640
"""Pictures of a task to learn from."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Regime:
    """How far each task moves the adapter."""

    name: str
    says: str
    keys: tuple[str, ...] = ()
    """In which its runs differ from the recipe."""
    methods: tuple[str, ...] | None = None
    """None: all."""
    ranks: tuple[int, ...] = (8, 16)
    """Of all methods alike: the one that is better on average over them."""
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ORDERS)
    captions: float | None = None
    """Their share in what its base was taught; None: the recipe's base, half of whose corpus was questions."""

    @property
    def base(self) -> str | None:
        """The folder of its own base beside the runs, if it has one."""
        return None if self.captions is None else f"captions_base_{self.captions}"


SMALL = Regime("Small updates", "40 steps a task at a learning rate of 1e-3")
LARGE = Regime("Large updates", "60 steps a task at a learning rate of 2e-3", ("steps=60", "optimizer.lr=2.0e-3"))
"""Both learn each task equally well by itself; it is what they do to the others that differs."""
NEW = Regime(
    "Tasks that are new to the base",
    "60 steps a task at a learning rate of 2e-3, from a base that was taught captions alone and answers no question",
    LARGE.keys,
    methods=("sequential", "average", "TIES", "PAM", "running mean", "PAM, running mean"),
    ranks=(8,),  # as chosen for large updates
    captions=1.0,
)
FAINT = Regime(
    "Tasks that the base has hardly seen",
    "60 steps a task at a learning rate of 2e-3, from a base three quarters of whose corpus were captions",
    LARGE.keys,
    methods=("sequential", "average", "TIES", "running average", "PAM", "running mean"),
    ranks=(8,),
    captions=0.75,
)
MANY = Regime(
    "Ten tasks",
    "All ten kinds, as under small updates and by the settings that were chosen there, on six",
    methods=("sequential", "average", "TIES", "running average", "PAM", "running mean"),
    ranks=(8,),
    orders=WIDE_ORDERS,
)
REGIMES = (SMALL, LARGE, MANY, FAINT, NEW)


def pam(alignment: Settings | None, kind: str = "pam", **more: Any) -> Settings:
    return {"type": kind, "alignment": alignment} | more


ALIGNMENTS: tuple[Settings, ...] = ({"share": 0.5}, {"share": 0.75}, {"share": 0.5, "every": 8})
"""p and K; K is 1/20 of a task's updates, here 2, where it is not named."""

METHODS: dict[str, tuple[Settings, ...]] = {
    "independent": ({"type": "independent"},),
    "sequential": ({"type": "sequential"},),
    "replay": tuple({"type": "replay", "share": share} for share in (0.3, 0.15, 0.5)),
    "average": tuple({"type": "average", "form": form} for form in ("factors", "delta")),
    "TIES": tuple({"type": "ties", "form": "delta", "density": density} for density in (0.2, 0.5, 0.8)),
    "MagMax": tuple({"type": "magmax", "form": form} for form in ("factors", "delta")),
    "running average": (pam(None),),
    "PAM": tuple(map(pam, ALIGNMENTS)),
    "running mean": (pam(None, average="running_mean"),),
    "PAM, running mean": tuple(pam(alignment, average="running_mean") for alignment in ALIGNMENTS),
    "PAM by change": tuple(pam({"importance": "change"} | alignment) for alignment in ALIGNMENTS),
    "PAM on B alone": tuple(pam({"factors": ["B"]} | alignment) for alignment in ALIGNMENTS),
    "PAM + TALL": tuple(pam({"share": 0.5}, "pam+tall") | {"threshold": threshold} for threshold in (0.4, 0.2, 0.6)),
}
"""What each may choose from, by ACC, at the common rank; the first is its default. The running ones are PAM in all but
the alignment, so that the difference is the alignment's share."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One run. Its folder is named by all that decides it, so that another is not taken for it."""

    method: str
    settings: Settings
    rank: int
    order: tuple[str, ...]
    seed: int
    regime: Regime

    @property
    def keys(self) -> list[str]:
        return [
            f"seed={self.seed}",
            f"adapter.rank={self.rank}",
            f"adapter.alpha={2 * self.rank}",
            f"continual.order={json.dumps(list(self.order))}",
            f"continual.method={json.dumps(self.settings, sort_keys=True)}",
            f"tasks={json.dumps([{'type': 'shapes', 'kind': kind, 'size': SIZE} for kind in self.order])}",
            *self.regime.keys,
        ]

    @property
    def name(self) -> str:
        base = [self.regime.base] if self.regime.base else []
        recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))  # whose comments decide nothing
        decides = "\n".join([json.dumps(recipe, sort_keys=True), *self.keys, *base])
        slug = "".join(c if c.isalnum() else "-" for c in self.method.lower()).strip("-")
        return f"{slug}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"


def run_cell(cell: Cell, out: Path) -> dict[str, Any]:
    """In a process of its own; the result of one that is done is read."""
    from remix.config import load_recipe
    from remix.train import run

    folder = out / cell.name
    done = folder / "result.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            base = [f"model.path={out / cell.regime.base}"] if cell.regime.base else []
            recipe = load_recipe(RECIPE, [f"run_dir={folder}", *cell.keys, *base])
            run(recipe, str(RECIPE), resume=(folder / "continual.json").exists())
    result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return result


def build_base(folder: Path, captions: float) -> None:
    """In some four minutes; nothing where it is there."""
    from scripts import build_shapes_model as builder

    if folder.exists():
        return
    processor = builder.make_processor()
    model, _ = builder.train(processor, builder.STEPS, seed=0, captions=captions)
    with TemporaryDirectory(dir=folder.parent) as half:
        builder.save(model, Path(half) / "base")
        processor.save_pretrained(Path(half) / "base")
        (Path(half) / "base").rename(folder)


class Study:
    """Runs of cells, several at a time; each once."""

    def __init__(self, out: Path, jobs: int) -> None:
        """`jobs`: 0 = run nothing, only read."""
        self.out, self.jobs = out, jobs
        self.results: dict[str, dict[str, Any]] = json.loads(SUMMARIES.read_text("utf-8")) if SUMMARIES.exists() else {}
        """By the cell's name."""

    def run(self, cells: Sequence[Cell], what: str) -> None:
        cells = [cell for cell in cells if cell.name not in self.results]
        if not self.jobs:
            for cell in cells:
                done = self.out / cell.name / "result.json"
                if done.exists():
                    self.results[cell.name] = json.loads(done.read_text("utf-8"))
            return
        self.out.mkdir(parents=True, exist_ok=True)
        for base, captions in {(cell.regime.base, cell.regime.captions) for cell in cells}:
            if base and captions is not None:
                build_base(self.out / base, captions)
        finished = in_processes(partial(run_cell, out=self.out), cells, self.jobs)
        for number, (cell, result) in enumerate(finished, 1):
            self.results[cell.name] = result
            shown = ", ".join(f"{key} {100 * result[key]:.1f}" for key in ("ACC", "BWT"))
            print(f"{what} {number}/{len(cells)}  {cell.method}, seed {cell.seed}: {shown}", flush=True)

    def acc(self, cell: Cell) -> float:
        return float(self.results[cell.name]["ACC"])


def choose(study: Study, regime: Regime) -> tuple[int, dict[str, Settings]]:
    """The common rank, then each method's settings at it."""
    offered = {method: METHODS[method] for method in regime.methods or METHODS}
    by_rank = {
        rank: [Cell(method, choices[0], rank, TUNING_ORDER, TUNING_SEED, regime) for method, choices in offered.items()]
        for rank in regime.ranks
    }
    study.run([cell for cells in by_rank.values() for cell in cells], "rank")
    rank = max(regime.ranks, key=lambda rank: fmean(map(study.acc, by_rank[rank])))
    by_method = {
        method: [Cell(method, settings, rank, TUNING_ORDER, TUNING_SEED, regime) for settings in choices]
        for method, choices in offered.items()
    }
    study.run([cell for cells in by_method.values() for cell in cells], "settings")
    return rank, {method: max(cells, key=study.acc).settings for method, cells in by_method.items()}


PAIRS = [
    *((method, "sequential") for method in ("running average", "PAM", "running mean", "PAM, running mean")),
    *((method, "running average") for method in ("PAM", "PAM by change", "PAM on B alone", "running mean")),
    ("PAM, running mean", "running mean"),
    *((method, other) for method in ("PAM", "running mean") for other in ("average", "TIES")),
]
"""Methods that are compared run by run."""
BARS = ("ACC 5 above sequential", "BWT at most half of sequential's", "ACC above average", "ACC above TIES")
"""What was expected of PAM; its kin are held to it too."""
HELD_TO_BARS = ("PAM", "running mean", "PAM, running mean")
KEPT = ("seed", "tasks", "ACC", "BWT", "forgetting", "zero_shot", "seconds")
"""Of a run's result."""


# --- the page -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Measured:
    """What the runs that are there say of methods with their chosen settings."""

    study: Study
    regime: Regime
    rank: int
    chosen: Mapping[str, Settings]
    seeds: int

    def cell(self, method: str, order: str, seed: int) -> Cell:
        return Cell(method, self.chosen[method], self.rank, self.regime.orders[order], seed, self.regime)

    def values(self, method: str, key: str, orders: Iterable[str] = ORDERS) -> dict[tuple[str, int], float]:
        """In percent, by order and seed."""
        if method not in self.chosen:
            return {}
        cells = {(order, seed): self.cell(method, order, seed) for order in orders for seed in range(self.seeds)}
        results = self.study.results
        return {at: 100 * results[cell.name][key] for at, cell in cells.items() if cell.name in results}

    def mean(self, method: str, key: str, order: str) -> float:
        return fmean(self.values(method, key, [order]).values())

    def row(self, method: str) -> list[str]:
        spreads = (spread([*self.values(method, key).values()]) for key in ("ACC", "BWT", "forgetting", "zero_shot"))
        return [method, str(len(self.values(method, "ACC"))), *spreads]

    def row_by_order(self, method: str) -> list[str]:
        means = ((self.mean(method, "ACC", order), self.mean(method, "BWT", order)) for order in ORDERS)
        return [method, *(f"{acc:.1f} / {bwt:+.1f}" for acc, bwt in means)]

    def by_order(self) -> dict[str, tuple[list[float], list[float]]]:
        """Of each method of the overview, means of ACC and BWT for each order."""
        acc, bwt = (lambda of, key=key: [self.mean(of, key, order) for order in ORDERS] for key in ("ACC", "BWT"))
        return {method: (acc(method), bwt(method)) for method in OVERVIEW if method in self.chosen}

    def row_of_bars(self, method: str, order: str) -> list[str]:
        acc, bwt = (lambda of, key=key: self.mean(of, key, order) for key in ("ACC", "BWT"))
        held = [
            acc(method) >= acc("sequential") + 5,
            bwt(method) >= bwt("sequential") / 2,
            *(acc(method) > acc(other) for other in ("average", "TIES")),
        ]
        return [method, order, *("yes" if bar else "no" for bar in held)]

    def row_of_pair(self, a: str, b: str) -> list[str]:
        """Over what both were run on."""
        pairs = ((self.values(a, key), self.values(b, key)) for key in ("ACC", "BWT"))
        differences = (difference([of_a[at] - of_b[at] for at in of_a if at in of_b]) for of_a, of_b in pairs)
        return [f"{a} − {b}", *differences]


def write_page(regimes: Sequence[Measured]) -> None:
    """docs/continual.md, and the picture and the results beside it."""
    results = regimes[0].study.results
    plain = {name: {key: run[key] for key in KEPT} for name, run in sorted(results.items())}
    SUMMARIES.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    draw(
        {
            of.regime.name: {m: ([*of.values(m, "ACC").values()], [*of.values(m, "BWT").values()]) for m in METHODS}
            for of in regimes
        },
        PAGE.with_suffix(".png"),
    )
    text = PAGE_TEXT.format(
        regimes="\n".join(map(section, regimes)),
        overview=overview({of.regime.name: of.by_order() for of in regimes}),
        orders=table(
            ["order", "six tasks", "ten tasks"],
            [[n, *(", ".join(o[n]) for o in (ORDERS, WIDE_ORDERS))] for n in ORDERS],
        ),
        seeds=regimes[0].seeds,
        minutes=f"{sum(result['seconds'] for result in results.values()) / 60:.0f}",
    )
    PAGE.write_text(text, encoding="utf-8")


def section(of: Measured) -> str:
    """What there is of a regime."""
    methods, ranks = [method for method in METHODS if of.values(method, "ACC")], of.regime.ranks
    settings = [[method, f"`{json.dumps(of.chosen[method])}`", str(len(METHODS[method]))] for method in methods]
    held_to = [method for method in HELD_TO_BARS if method in methods]
    pairs = [of.row_of_pair(*pair) for pair in PAIRS if set(pair) <= {*methods}]
    return SECTION_TEXT.format(
        name=of.regime.name,
        says=of.regime.says,
        scores=table(["method", "runs", "ACC", "BWT", "forgetting", "zero-shot"], map(of.row, methods)),
        by_order=table(["method", *(f"{n}: ACC / BWT" for n in ORDERS)], map(of.row_by_order, methods)),
        bars=table(["method", "order", *BARS], [of.row_of_bars(m, order) for m in held_to for order in ORDERS]),
        paired=table(["difference", "ACC", "BWT"], pairs),
        settings=table(["method", "settings", "of"], settings),
        rank=f"rank {of.rank}" + (f" of {' and '.join(map(str, ranks))}" if len(ranks) > 1 else ""),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study_continual")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    study = Study(options.out.resolve(), 0 if options.write_only else options.jobs)
    regimes = [Measured(study, regime, *choose(study, regime), options.seeds) for regime in REGIMES]
    for variants in (False, True):
        for seed in range(options.seeds):
            for of in regimes:
                methods = [method for method in of.chosen if (method in VARIANTS) == variants]
                study.run([of.cell(method, order, seed) for order in ORDERS for method in methods], "measured")
    write_page(regimes)
    print(PAGE)


if __name__ == "__main__":
    main()
