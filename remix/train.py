"""What `accelerate launch -m remix.train RECIPE [key=value ...] [--resume RUN_DIR]` enters: parses, plans, runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remix.terminal import Parser, guard_tracebacks, print_error

if TYPE_CHECKING:
    from remix.config import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 training stopped on an error, 2 the request itself is wrong, 130 interrupted."""
    guard_tracebacks()
    parser = Parser(prog="remix.train", description="Trains a recipe.")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE key=value",
        help="a YAML file (with --resume the run's own, unless named) and dotted recipe keys, for example seed=1",
    )
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with an interrupted run, in place")
    options = parser.parse_intermixed_args(arguments)
    # Spinning OpenMP threads on shared cores cost more than they give; torch reads these when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from remix.config import load_recipe
    from remix.errors import TrainingError

    try:
        path, overrides = _request(options.words, options.resume)
        recipe = load_recipe(path, overrides)
        run(recipe, path, resume=options.resume is not None)
    except ValueError as error:
        print_error(error)
        return 2
    except TrainingError as error:
        print_error(error)
        return 1
    except OSError as error:
        print_error(
            f"{error}. What was written before is whole: free space or mend the path, then go on with "
            f"--resume {recipe.run_dir}"
        )
        return 1
    except KeyboardInterrupt:
        print(
            "stopped; --resume goes on from the last checkpoint, or begins again where there is none yet",
            file=sys.stderr,
        )
        return 130
    return 0


def run(recipe: Recipe, recipe_path: str = "recipe.yaml", *, resume: bool = False) -> dict[str, Any]:
    """Trains a recipe to its last step, writes final/ and result.json into its run directory, returns the result.

    `recipe_path` names the recipe in what is written. Raises ValueError for a request that cannot be met and
    TrainingError for training that cannot go on.
    """
    from rich.console import Console

    from remix.models.loading import quiet
    from remix.tracking.progress import Progress
    from remix.tracking.summary import before_after_table
    from remix.training.build import open_trainer
    from remix.training.distributed import Cluster
    from remix.training.finish import finish
    from remix.training.plan import make_plan

    make_plan(recipe, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    _check_run_dir(Path(recipe.run_dir), resume=resume)
    quiet()
    cluster = Cluster(recipe.log.trackers, Path(recipe.run_dir))
    progress = Progress(Path(recipe_path).stem, recipe.run_dir, recipe.last_step, enabled=cluster.is_main)
    with progress, open_trainer(recipe, cluster, progress, resume=resume) as trainer:
        if trainer.state.step >= recipe.last_step:
            progress.message(f"all {recipe.last_step} steps are done: set max_steps or steps higher to go on")
        trainer.fit()
        result = finish(trainer, recipe_path)
    if cluster.is_main:
        Console(markup=False, emoji=False).print(before_after_table(result))
    return result


def _request(words: list[str], resume: str | None) -> tuple[str, list[str]]:
    """The recipe file and its overrides. A resumed run stays in its directory."""
    recipes, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if len(recipes) > 1:
        raise ValueError(f"one recipe at a time, not {' and '.join(recipes)}; overrides are written key=value")
    if resume is None:
        if not recipes:
            raise ValueError("name a recipe, for example recipes/embedded/remix_grpo.yaml")
        return recipes[0], overrides
    own = Path(resume) / "recipe.yaml"
    if not own.exists():
        raise ValueError(f"--resume {resume}: no run there (recipe.yaml is missing)")
    return (recipes or [str(own)])[0], [*overrides, f"run_dir={resume}"]


def _check_run_dir(run_dir: Path, *, resume: bool) -> None:
    metrics = run_dir / "metrics.jsonl"
    if not resume and metrics.exists() and metrics.stat().st_size:
        raise ValueError(
            f"run_dir {run_dir} already holds a run: add --resume {run_dir} to go on with it, or choose another run_dir"
        )


if __name__ == "__main__":
    sys.exit(main())
