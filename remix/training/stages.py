"""The runs that a recipe with a `continual:` block is made of, one for each task. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remix.config import IndependentMethod, MergingBlock, PAMMethod, Recipe, ReplayMethod, nearest, parse_recipe
from remix.tasks import task_names
from remix.training.plan import Plan, make_plan


def make_plans(recipe: Recipe, world_size: int = 1) -> dict[str, Plan]:
    """By task in the order of learning; of a recipe without `continual:` the one plan, under "". Raises ValueError."""
    if recipe.continual is None:
        return {"": make_plan(recipe, world_size)}
    order = task_order(recipe)
    plans = {}
    for index, task in enumerate(order):
        # What it will begin with is not there yet.
        plain = stage_recipe(recipe, order, index).model_dump(mode="json")
        plain["adapter"]["path"], plain["alignment"] = None, None
        plans[task] = make_plan(parse_recipe(plain), world_size)
    return plans


def task_order(recipe: Recipe) -> list[str]:
    """Raises ValueError on a task that is not there, or there twice."""
    assert recipe.continual is not None
    names = task_names(recipe.tasks)
    order = list(recipe.continual.order) or names
    for name in order:
        if name not in names:
            raise ValueError(f"continual.order: no task '{name}'; {nearest(name, names)}")
        if order.count(name) > 1:
            raise ValueError(f"continual.order: '{name}' is there twice; name every task once")
    return order


def stage_dir(run_dir: Path, index: int) -> Path:
    return run_dir / "stages" / f"task={index:02d}"


def stage_recipe(recipe: Recipe, order: Sequence[str], index: int) -> Recipe:
    """The ordinary recipe that learns one task."""
    assert recipe.continual is not None
    method, run_dir = recipe.continual.method, Path(recipe.run_dir)
    plain = recipe.model_dump(mode="json") | {"continual": None, "run_dir": str(stage_dir(run_dir, index))}
    tasks = [task | {"label": name} for name, task in zip(task_names(recipe.tasks), plain["tasks"], strict=True)]
    by_name = {task["label"]: task for task in tasks}
    plain["tasks"] = [by_name[order[index]] | {"weight": 1.0}]
    if isinstance(method, ReplayMethod) and index:
        plain["tasks"][0]["weight"] = 1.0 - method.share
        plain["tasks"] += [
            _stored(by_name[name], method.stored) | {"weight": method.share / index} for name in order[:index]
        ]
    plain["eval"] |= {"tasks": [by_name[name] for name in order], "before": index == 0}
    plain["adapter"] |= {"path": str(_start(recipe, index))}
    if isinstance(method, PAMMethod) and method.alignment is not None and index:
        plain["alignment"] = method.alignment.model_dump(mode="json") | {"initial": str(run_dir / "initial")}
    return parse_recipe(plain, f"task '{order[index]}' of the recipe")


def _start(recipe: Recipe, index: int) -> Path:
    """The adapter that a task's training begins with."""
    assert recipe.continual is not None
    method, run_dir = recipe.continual.method, Path(recipe.run_dir)
    afresh = isinstance(method, IndependentMethod) or (isinstance(method, MergingBlock) and method.start == "initial")
    if index == 0 or afresh:
        return run_dir / "initial"
    merges = isinstance(method, PAMMethod)
    return stage_dir(run_dir, index - 1) / ("merged" if merges else "final")


def _stored(task: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first so many prompts of a task that was learnt before."""
    key = "size" if "size" in task else "limit"
    return {**task, key: count if task[key] is None else min(task[key], count)}
