"""Rollouts that ReMix and on-policy training take to an accuracy, what parts of ReMix matter, what replay does.

    python scripts/study_efficiency.py                     # runs what is missing, then writes the page
    python scripts/study_efficiency.py --write-only        # the page from what docs/evidence.json has

Every cell is a run of a recipe in recipes/embedded with other keys. Its result goes into docs/evidence.json as soon as
it is there: that cell is not run again. A cell that was interrupted begins again; one in which training failed is shown
as failed, and tried again by the next call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import efficiency_curves as curves
from scripts import efficiency_page as page
from scripts.efficiency_arms import (
    ABLATIONS,
    ALGORITHMS,
    BEYOND,
    DYNAMICS,
    DYNAMICS_PANELS,
    FIRST,
    PAPER_ABLATION,
    REMIX,
    SINGLE,
    TASKS,
    Arm,
    arms,
)

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "embedded"
PAGE = ROOT / "docs" / "evidence.md"
TUNING_SEED = 1000
CHEAP = ("log.trackers=[]", "log.completions_every=0", "checkpoint.every=0", "checkpoint.best=null")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    budget: int = 8192
    """Rollouts of every run; the last step may go beyond."""
    seeds: int = 5
    dynamics_seeds: int = 3
    eval_rollouts: int = 512
    """From one evaluation to the next, about: a whole number of steps."""
    eval_prompts: int = 512


@dataclass(frozen=True)
class Cell:
    """One run, named by all that decides it."""

    what: str
    recipe: str
    keys: tuple[str, ...]
    seed: int
    sizes: Sizes

    @property
    def all_keys(self) -> list[str]:
        return [*CHEAP, f"eval.prompts={self.sizes.eval_prompts}", f"seed={self.seed}", *final(self.keys)]

    @property
    def path(self) -> Path:
        return RECIPES / f"{self.recipe}.yaml"

    @property
    def name(self) -> str:
        amounts = map(str, (self.sizes.budget, self.sizes.eval_rollouts))
        decides = "\n".join([science(self.path), *self.all_keys, *amounts])
        return f"{self.recipe}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"


@cache
def science(path: Path) -> str:
    """What a recipe says; its comments decide nothing."""
    return json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True)


def final(keys: Sequence[str]) -> list[str]:
    """Of a key that occurs twice, or within one that comes later, the last; in the order of names, parents first, so
    that equal runs have one name."""
    kept = dict[str, str]()
    for key, value in (key.split("=", 1) for key in keys):
        kept = {name: given for name, given in kept.items() if not name.startswith(f"{key}.")} | {key: value}
    return [f"{key}={value}" for key, value in sorted(kept.items())]


def steps_of(recipe: Any, budget: int) -> int:
    """Training steps that generate at least `budget` rollouts; the first step after a change samples a whole batch. A
    phase whose end is not known is taken to go on: its replay samples the least."""
    from remix.config import StepsTrigger
    from remix.training.schedule import first_step_rollouts, step_rollouts

    rollouts = steps = 0
    for phase in recipe.phases:
        ends = phase.until[0] if phase.until else None
        length = ends.after if isinstance(ends, StepsTrigger) else budget
        for at in range(length):
            if rollouts >= budget:
                return steps
            rollouts += first_step_rollouts(recipe, phase, first=not steps) if not at else step_rollouts(recipe, phase)
            steps += 1
    return steps


def run_cell(cell: Cell, out: Path) -> dict[str, Any]:
    """In a worker. Where training cannot go on, that is the result: it has no curve then, and reaches nothing."""
    from remix.config import load_recipe
    from remix.errors import TrainingError
    from remix.train import run

    began = time.perf_counter()
    folder = out / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            keys = [f"run_dir={folder}", *cell.all_keys]
            steps = steps_of(load_recipe(cell.path, keys), cell.sizes.budget)
            every = max(1, round(steps * cell.sizes.eval_rollouts / cell.sizes.budget))
            run(load_recipe(cell.path, [*keys, f"steps={steps}", f"eval.every={every}"]), str(cell.path))
        except TrainingError as error:
            return {"failed": " ".join(str(error).split())[:200], **spent(began)}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    result = curves.summary(rows, json.loads((folder / "result.json").read_text("utf-8"))["base_pass_at_1"])
    for bulky in ("checkpoints", "rollouts", "final"):
        shutil.rmtree(folder / bulky, ignore_errors=True)
    return result | spent(began)


def spent(began: float) -> dict[str, Any]:
    machine = f"{os.cpu_count()} cores of {platform.machine()}, one thread a run"
    return {"took": round(time.perf_counter() - began, 1), "machine": machine}


def end_with_parent() -> None:
    """In a worker: nobody waits for what it writes once the study is killed, and the next one begins the cell anew."""
    parent = parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Study:
    """Runs of cells, several at a time; each once."""

    def __init__(self, out: Path, jobs: int, summaries: Path, sizes: Sizes) -> None:
        """`jobs`: 0 = run nothing, only read."""
        self.out, self.jobs, self.summaries, self.sizes = out, jobs, summaries, sizes
        self.results: dict[str, dict[str, Any]] = json.loads(summaries.read_text("utf-8")) if summaries.exists() else {}
        """By the cell's name."""
        self.wanted: dict[str, Cell] = {}
        self.tried = set[str]()
        """Cells that were run by this study itself: one that failed is not tried twice."""

    def cell(self, what: str, recipe: str, keys: Sequence[str], seed: int) -> Cell:
        return Cell(what, recipe, tuple(keys), seed, self.sizes)

    def run(self, cells: Sequence[Cell]) -> None:
        self.wanted.update({cell.name: cell for cell in cells})
        failed = {name for name, run in self.results.items() if "failed" in run} - self.tried
        missing = {cell.name: cell for cell in cells if cell.name in failed or cell.name not in self.results}
        if not self.jobs or not missing:
            return
        with ProcessPoolExecutor(self.jobs, get_context("spawn"), end_with_parent) as pool:
            futures = {pool.submit(run_cell, cell, self.out): cell for cell in missing.values()}
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    cell, result = futures[future], future.result()
                    self.results[cell.name] = result
                    self.tried.add(cell.name)
                    self.save()
                    said = result.get("failed") or f"pass@1 {100 * result['pass@1'][-1]:.1f}"
                    print(f"{number}/{len(missing)}  {cell.what}, seed {cell.seed}: {said}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def save(self) -> None:
        self.summaries.parent.mkdir(parents=True, exist_ok=True)
        half = self.summaries.with_suffix(".half")
        lines = (f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(self.results.items()))
        half.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        half.replace(self.summaries)

    def runs(self, cells: Sequence[Cell]) -> dict[int, dict[str, Any]]:
        """By seed; a failed run is there without a curve."""
        return {cell.seed: self.results[cell.name] for cell in cells if cell.name in self.results}


Score = Callable[[Mapping[str, Any]], tuple[float, ...]]


def tune(study: Study, arm: Arm, score: Score) -> dict[tuple[str, ...], dict[str, Any]]:
    """The runs that did not fail, by the arm's keys, each round with the best of the rounds before; none as long as a
    run of the tuning is missing."""
    keys, found = (*TASKS[FIRST], *arm.keys), dict[tuple[str, ...], dict[str, Any]]()
    for options in arm.rounds:
        tries = [(*keys, *more) for more in options]
        cells = [study.cell(f"tuning {arm.recipe}, {arm.name}", arm.recipe, t, TUNING_SEED) for t in tries]
        study.run(cells)
        if any(cell.name not in study.results for cell in cells):
            return {}
        runs = {t: study.results[c.name] for t, c in zip(tries, cells, strict=True)}
        found |= {t: run for t, run in runs.items() if "failed" not in run}
        keys = max(found, key=lambda t: score(found[t]), default=keys)
    return found


def scorer(study: Study, single: Mapping[str, Any] | None) -> Score:
    """Rollouts to 90% of what the single-pass arm gained with the tuning seed, else what was reached."""
    budget = study.sizes.budget

    def score(run: Mapping[str, Any]) -> tuple[float, ...]:
        reached = curves.best(run, budget)
        if single is None:
            return (reached,)
        target = curves.gain_share(single["pass@1"][0], curves.best(single, budget), 0.9)
        rollouts = curves.cost_to(run, target, "rollouts", budget)
        return (0.0, reached) if rollouts is None else (1.0, -rollouts)

    return score


@dataclass(frozen=True)
class Measured:
    """The arms of an algorithm on a task: their chosen keys, and their runs by seed."""

    algorithm: str
    task: str
    chosen: Mapping[str, tuple[str, ...] | None]
    runs: Mapping[str, Mapping[int, Mapping[str, Any]]]


def measure(study: Study, algorithm: str, task: str) -> Measured:
    chosen: dict[str, tuple[str, ...] | None] = {}
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    single = None
    for arm in arms(algorithm):
        found = {} if single is None and arm.name != SINGLE else tune(study, arm, scorer(study, single))
        if found and single is None:
            single = max(found.values(), key=scorer(study, None))
        score = scorer(study, single)
        keys = chosen[arm.name] = max(found, key=lambda t: score(found[t]), default=None)
        if keys is None:
            runs[arm.name] = {}
            continue
        what, on_task = f"{arm.recipe}, {arm.name}, {task}", (*keys, *TASKS[task])
        cells = [study.cell(what, arm.recipe, on_task, seed) for seed in range(study.sizes.seeds)]
        study.run(cells)
        runs[arm.name] = study.runs(cells)
    return Measured(algorithm, task, chosen, runs)


def variants(
    study: Study, algorithm: str, keys: Sequence[str] | None, settings: Mapping[str, tuple[str, ...]], seeds: int
) -> dict[str, Any]:
    """ReMix on the first task with `keys` and those of each setting; empty as long as `keys` are not tuned."""
    recipe = f"remix_{algorithm}"
    cells = {
        name: [study.cell(f"{recipe}, {name}", recipe, (*(keys or ()), *more), seed) for seed in range(seeds)]
        for name, more in settings.items()
    }
    if keys is not None:
        study.run([cell for of_setting in cells.values() for cell in of_setting])
    return {name: study.runs(of_setting) if keys is not None else {} for name, of_setting in cells.items()}


def recipes_own(of: Measured) -> tuple[str, ...] | None:
    """The recipe's own ReMix, at the tuned learning rate."""
    keys = of.chosen[REMIX]
    return None if keys is None else tuple(key for key in keys if key.startswith("optimizer.lr="))


# --- the parts, and the page --------------------------------------------------------------------------------------


Part = Callable[[Study], Any]


def ablation(study: Study, algorithm: str) -> dict[str, Any]:
    return variants(study, algorithm, recipes_own(measure(study, algorithm, FIRST)), ABLATIONS, study.sizes.seeds)


def beyond(study: Study, algorithm: str) -> dict[str, Any]:
    tuned = measure(study, algorithm, FIRST).chosen[REMIX]
    return variants(study, algorithm, tuned, BEYOND[algorithm], study.sizes.seeds)


def dynamics(study: Study) -> dict[str, Any]:
    return variants(study, "grpo", recipes_own(measure(study, "grpo", FIRST)), DYNAMICS, study.sizes.dynamics_seeds)


PARTS: tuple[Part, ...] = (
    *(partial(measure, algorithm="grpo", task=task) for task in TASKS),
    partial(ablation, algorithm="grpo"),
    partial(beyond, algorithm="grpo"),
    *(partial(measure, algorithm="ppo", task=task) for task in TASKS),
    dynamics,
    partial(ablation, algorithm="ppo"),
    partial(beyond, algorithm="ppo"),
)
"""In the order in which they are run."""


def write_page(study: Study, path: Path) -> None:
    """docs/evidence.md, and the pictures beside it; of what there is."""
    budget, picture = study.sizes.budget, path.with_name(f"{path.stem}_dynamics.png")
    measured = {f"{a.upper()}, {task}": measure(study, a, task) for a in ALGORITHMS for task in TASKS}
    ablations = {f"{a.upper()}, {FIRST}": ablation(study, a) for a in ALGORITHMS}
    found = dynamics(study)
    orderings = [
        *(row for name, of in measured.items() for row in page.saving_rows(name, of)),
        *(row for name, of in ablations.items() for row in page.ablation_rows(name, of, PAPER_ABLATION, budget)),
        *page.dynamics_rows(found, budget),
    ]
    sections = [
        *(page.arms_section(name, of, budget) for name, of in measured.items()),
        *(page.dynamics_section(f"Ablation of ReMix-{name}", of, budget) for name, of in ablations.items()),
        page.dynamics_section(f"Dynamics of ReMix-GRPO, {FIRST}", found, budget, picture.name),
        *(
            page.beyond_section(
                f"Beyond the paper: ReMix-{a.upper()}", measure(study, a, FIRST), beyond(study, a), budget
            )
            for a in ALGORITHMS
        ),
        page.orderings_section(orderings),
    ]
    notes = path.with_name(f"{path.stem}_notes.md")  # written by hand: what did not come out, and why
    page.draw({name: _lists(of.runs) for name, of in measured.items()}, path.with_suffix(".png"))
    panels = {title: _lists({name: found[name] for name in names}) for title, names in DYNAMICS_PANELS.items()}
    page.draw(panels | {f"Ablation, {name}": _lists(of) for name, of in ablations.items()}, picture)
    wanted = {name: study.results[name] for name in study.wanted if name in study.results}
    failures = [(study.wanted[name], run["failed"]) for name, run in wanted.items() if "failed" in run]
    text = page.PAGE_TEXT.format(
        budget=budget,
        prompts=study.sizes.eval_prompts,
        every=study.sizes.eval_rollouts,
        first=FIRST,
        sections="\n".join(sections),
        command="python scripts/study_efficiency.py",
        present=len(wanted) - len(failures),
        wanted=len(study.wanted),
        failed=f", {len(failures)} failed" if failures else "",
        notes=notes.read_text(encoding="utf-8") + "\n" if notes.exists() else "",
        hours=sum(run["took"] for run in wanted.values()) / 3600,
        hardware=" and ".join(sorted({run["machine"] for run in wanted.values()})) or "no machine",
        failures="".join(f"\n* {of.what}, seed {of.seed}: `{why.replace('`', '')}`" for of, why in failures),
    )
    path.write_text(text, encoding="utf-8")


def _lists(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, list[Mapping[str, Any]]]:
    return {name: [*by_seed.values()] for name, by_seed in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study_efficiency")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    kept, sizes = PAGE.with_suffix(".json"), Sizes()
    study = Study(options.out.resolve(), options.jobs, kept, sizes)
    for part in () if options.write_only else PARTS:
        part(study)
        write_page(Study(options.out, 0, kept, sizes), PAGE)
    write_page(Study(options.out, 0, kept, sizes), PAGE)
    print(PAGE)


if __name__ == "__main__":
    main()
