"""Rollouts that ReMix and on-policy training take to an accuracy, what parts of ReMix matter, what replay does.

    python scripts/study_efficiency.py                     # runs what is missing, then writes the page
    python scripts/study_efficiency.py --write-only        # the page from what docs/evidence.json has

Every cell is a run of a recipe in recipes/embedded with other keys. Its result goes into docs/evidence.json as soon as
it is there: that cell is not run again. A cell that was interrupted begins again; one in which training failed is shown
as failed, and tried again by the next call.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import efficiency_curves as curves
from scripts import efficiency_page as page
from scripts.efficiency_arms import (
    ABLATIONS,
    ALGORITHMS,
    BEYOND,
    CONTROLS,
    DYNAMICS,
    DYNAMICS_PANELS,
    FIRST,
    PAPER_ABLATION,
    REMIX,
    SINGLE,
    TAKEN_OUT,
    TASKS,
    Arm,
    arms,
)
from scripts.efficiency_curves import Measured
from scripts.efficiency_runs import Cell, Sizes, Study, final

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "evidence.md"
TUNING_SEED = 1000

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
    """Rollouts to 90% of what the single-pass arm gained with the tuning seed; among equals, and where that was not
    gained, what was reached."""
    budget = study.sizes.budget

    def score(run: Mapping[str, Any]) -> tuple[float, ...]:
        reached = curves.best(run, budget)
        if single is None:
            return (reached,)
        target = curves.gain_share(single["pass@1"][0], curves.best(single, budget), 0.9)
        rollouts = curves.cost_to(run, target, "rollouts", budget)
        return (0.0, reached) if rollouts is None else (1.0, -rollouts, reached)

    return score


def measure(study: Study, algorithm: str, task: str) -> Measured:
    chosen: dict[str, tuple[str, ...] | None] = {}
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    single = None
    for arm in arms(algorithm):
        found = {} if single is None and arm.name != SINGLE else tune(study, arm, scorer(study, single))
        if found and single is None:
            single = max(found.values(), key=scorer(study, None))
        score = scorer(study, single)
        best = max(found, key=lambda t: score(found[t]), default=None)
        if best is None:
            chosen[arm.name], runs[arm.name] = None, {}
            continue
        keys = chosen[arm.name] = tuple(final(best))
        what, on_task = f"{arm.recipe}, {arm.name}, {task}", (*keys, *TASKS[task])
        cells = [study.cell(what, arm.recipe, on_task, seed) for seed in range(study.sizes.seeds)]
        study.run(cells)
        runs[arm.name] = study.runs(cells)
    return Measured(chosen, runs)


Settings = Mapping[str, tuple[str, ...]]


def cells_of(
    study: Study, algorithm: str, keys: Sequence[str], settings: Settings, seeds: int
) -> dict[str, list[Cell]]:
    """ReMix on the first task with `keys` and those of each setting."""
    recipe = f"remix_{algorithm}"
    return {
        name: [study.cell(f"{recipe}, {name}", recipe, (*keys, *more), seed) for seed in range(seeds)]
        for name, more in settings.items()
    }


def variants(
    study: Study, algorithm: str, keys: Sequence[str] | None, settings: Settings, seeds: int
) -> dict[str, Any]:
    """Runs of these cells; none as long as `keys` are not tuned."""
    if keys is None:
        return {name: {} for name in settings}
    cells = cells_of(study, algorithm, keys, settings, seeds)
    study.run([cell for of_setting in cells.values() for cell in of_setting])
    return {name: study.runs(of_setting) for name, of_setting in cells.items()}


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
    found = variants(study, algorithm, tuned, BEYOND[algorithm], study.sizes.seeds)
    gone = cells_of(study, algorithm, tuned or (), TAKEN_OUT[algorithm], study.sizes.seeds)
    return found | {name: study.runs(cells) for name, cells in gone.items()}


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
    budget = study.sizes.budget
    measured = {f"{a.upper()}, {task}": measure(study, a, task) for a in ALGORITHMS for task in TASKS}
    ablations = {f"{a.upper()}, {FIRST}": ablation(study, a) for a in ALGORITHMS}
    found = dynamics(study)
    added = {algorithm: beyond(study, algorithm) for algorithm in ALGORITHMS}
    orderings = [
        *(row for name, of in measured.items() for row in page.saving_rows(name, of)),
        *(row for name, of in ablations.items() for row in page.ablation_rows(name, of, PAPER_ABLATION, budget)),
        *page.dynamics_rows(found, budget),
    ]
    decided = [row for row in orderings if row[1] != "missing"]
    panels = {title: {name: found[name] for name in names} for title, names in DYNAMICS_PANELS.items()}
    panels |= {f"Ablation, {name}": of for name, of in ablations.items()}
    details = page.draw(panels, path.with_name(f"{path.stem}_dynamics.png"))
    sections = {
        **{name: (of.runs.values(), page.arms_section(of, budget)) for name, of in measured.items()},
        **{
            f"Ablation of ReMix-{name}": (of.values(), page.dynamics_section(of, budget))
            for name, of in ablations.items()
        },
        f"Dynamics of ReMix-GRPO, {FIRST}": (found.values(), page.dynamics_section(found, budget)),
        **{
            f"Beyond the paper: ReMix-{a.upper()}": (
                of.values(),
                page.beyond_section(measured[f"{a.upper()}, {FIRST}"], of, TAKEN_OUT[a], CONTROLS, budget),
            )
            for a, of in added.items()
        },
        "The paper's orderings": (decided, details + page.orderings_section(decided)),
    }
    notes = path.with_name(f"{path.stem}_notes.md")  # written by hand: what did not come out, and why
    wanted = {name: study.results[name] for name in study.wanted if name in study.results}
    failures = [(study.wanted[name], run["failed"]) for name, run in wanted.items() if "failed" in run]
    text = page.PAGE_TEXT.format(
        budget=budget,
        prompts=study.sizes.eval_prompts,
        every=study.sizes.eval_rollouts,
        first=FIRST,
        picture=page.draw({name: of.runs for name, of in measured.items()}, path.with_suffix(".png")),
        sections=page.join(sections),
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
