"""Which run goes on: what `--resume` means, before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from remix.config import Recipe, RecipeError, changed_keys, load_recipe


def add_resume_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="go on with an interrupted run, in place; RECIPE may be left out. `auto`: with the run in the recipe's "
        "run_dir, else the newest one beside it of the same recipe, else a new one",
    )
    parser.add_argument(
        "--allow-changed", action="store_true", help="go on although the recipe is not the one that was begun with"
    )


def resolve(words: Sequence[str], resume: str | None) -> tuple[str, list[str], bool]:
    """The recipe file, its overrides, and whether a run goes on. A resumed run stays in its directory."""
    recipes, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if len(recipes) > 1:
        raise ValueError(f"one recipe at a time, not {' and '.join(recipes)}; overrides are written key=value")
    if resume is None:
        if not recipes:
            raise ValueError(
                "name a recipe, for example recipes/embedded/remix_grpo.yaml, or a run to go on with: --resume RUN_DIR"
            )
        return recipes[0], overrides, False
    if resume == "auto":
        if not recipes:
            raise ValueError("--resume auto needs the recipe whose newest run is to go on")
        newest = newest_run(load_recipe(recipes[0], overrides))
        resumed = [] if newest is None else [f"run_dir={newest}"]
        return recipes[0], [*overrides, *resumed], newest is not None
    own = Path(resume) / "recipe.yaml"
    if not own.exists():
        raise ValueError(f"--resume {resume}: no run there (recipe.yaml is missing)")
    return (recipes or [str(own)])[0], [*overrides, f"run_dir={resume}"], True


def newest_run(recipe: Recipe) -> Path | None:
    """The directory of the run to go on with: the recipe's run_dir where there is a run, whatever its recipe; else the
    newest one beside it whose recipe makes the same run."""
    if (Path(recipe.run_dir) / "recipe.yaml").exists():
        return Path(recipe.run_dir)

    def is_same(run_dir: Path) -> bool:
        try:
            return not changed_keys(load_recipe(run_dir / "recipe.yaml"), recipe)
        except RecipeError:  # of another version, or none at all
            return False

    runs = [path.parent for path in Path(recipe.run_dir).parent.glob("*/recipe.yaml") if is_same(path.parent)]
    return max(runs, key=_last_written, default=None)


def _last_written(run_dir: Path) -> float:
    return max(path.stat().st_mtime for path in (run_dir / "recipe.yaml", *run_dir.glob("checkpoints/step=*")))
