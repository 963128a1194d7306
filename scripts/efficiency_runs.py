"""Runs of the study of rollouts to accuracy: cells, several at a time, each once, and what is kept of them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from scripts import efficiency_curves as curves
from scripts.processes import in_processes

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "embedded"
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
        finished = in_processes(partial(run_cell, out=self.out), [*missing.values()], self.jobs)
        for number, (cell, result) in enumerate(finished, 1):
            self.results[cell.name] = result
            self.tried.add(cell.name)
            self.save()
            said = result.get("failed") or f"pass@1 {100 * result['pass@1'][-1]:.1f}"
            print(f"{number}/{len(missing)}  {cell.what}, seed {cell.seed}: {said}", flush=True)

    def save(self) -> None:
        self.summaries.parent.mkdir(parents=True, exist_ok=True)
        half = self.summaries.with_suffix(".half")
        lines = (f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(self.results.items()))
        half.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        half.replace(self.summaries)

    def runs(self, cells: Sequence[Cell]) -> dict[int, dict[str, Any]]:
        """By seed; a failed run is there without a curve."""
        return {cell.seed: self.results[cell.name] for cell in cells if cell.name in self.results}
