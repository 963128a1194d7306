"""What `accelerate launch -m remix.train RECIPE [key=value ...] [--resume RUN_DIR]` enters: parses, plans, runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remix.imports import lasting
from remix.terminal import Parser, guard_tracebacks, print_error
from remix.training.resume import add_resume_options, resolve

if TYPE_CHECKING:
    from rich.console import RenderableType

    from remix.config import Recipe
    from remix.training.distributed import Cluster
    from remix.training.interruption import Interruption


BEGUN = ("metrics.jsonl", "continual.json")
"""A run directory that holds one of these, and not empty, holds a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 training stopped on an error, 2 the request itself is wrong, 75 interrupted by SIGTERM or
    Ctrl-C and saved, 130 interrupted a second time and not saved. After 1, 75 and 130 the run goes on with --resume."""
    guard_tracebacks()
    parser = Parser(prog="remix.train", description="Trains a recipe.")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE key=value",
        help="a YAML file (with --resume the run's own, unless named) and dotted recipe keys, for example seed=1",
    )
    add_resume_options(parser)
    options = parser.parse_intermixed_args(arguments)
    # Spinning OpenMP threads on shared cores cost more than they give; torch reads these when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from remix.training.interruption import Interruption, record

    with Interruption() as interruption:
        status = _run(options, interruption)
        record(status)
    return status


def _run(options: argparse.Namespace, interruption: Interruption) -> int:
    from remix.config import load_recipe
    from remix.errors import Interrupted, TrainingError
    from remix.training.interruption import EXIT_FAILED, EXIT_INTERRUPTED

    recipe = None
    try:
        path, overrides, resume = resolve(options.words, options.resume)
        recipe = load_recipe(path, overrides)
        interruption.grace = recipe.faults.grace
        with lasting():
            import_module("remix.training.build")
        run(recipe, path, resume=resume, allow_changed=options.allow_changed, interruption=interruption)
    except ValueError as error:
        print_error(error)
        return 2
    except TrainingError as error:
        print_error(error)
        return EXIT_FAILED
    except OSError as error:
        print_error(
            f"{error}. What was written before is whole: free space or mend the path, then go on with "
            f"--resume {recipe.run_dir if recipe else options.resume}"
        )
        return EXIT_FAILED
    except Interrupted:
        begun = recipe is not None and (Path(recipe.run_dir) / "recipe.yaml").exists()
        said = f"--resume {recipe.run_dir} goes on from here" if begun and recipe else "nothing was begun yet"
        print(f"interrupted; {said}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print(
            "stopped; --resume goes on from the last checkpoint, or begins again where there is none yet",
            file=sys.stderr,
        )
        return 130
    return 0


def run(
    recipe: Recipe,
    recipe_path: str = "recipe.yaml",
    *,
    resume: bool = False,
    allow_changed: bool = False,
    interruption: Interruption | None = None,
) -> dict[str, Any]:
    """Trains a recipe to its last step, writes final/ and result.json into its run directory, returns the result.

    `recipe_path` names the recipe in what is written; `allow_changed` lets a resumed run differ from the one that was
    begun. Raises ValueError for a request that cannot be met, TrainingError for training that cannot go on, and
    Interrupted after a signal, if an `interruption` listens for one.
    """
    from remix.models.loading import quiet
    from remix.training.backends import check_recipe
    from remix.training.distributed import Cluster
    from remix.training.interruption import Interruption
    from remix.training.stages import make_plans

    interruption = interruption or Interruption()
    make_plans(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    _check_run_dir(Path(recipe.run_dir), resume=resume)
    quiet()
    with Cluster(recipe.log.trackers, Path(recipe.run_dir), rank_timeout=recipe.faults.rank_timeout) as cluster:
        check_recipe(recipe, cluster.backend)
        interruption.gone = cluster.gone
        learn = _one_task if recipe.continual is None else _one_after_the_other
        return learn(
            recipe, recipe_path, cluster, resume=resume, allow_changed=allow_changed, interruption=interruption
        )


def _one_task(recipe: Recipe, recipe_path: str, cluster: Cluster, **options: Any) -> dict[str, Any]:
    from remix.tracking.progress import Progress
    from remix.tracking.summary import before_after_table
    from remix.training.build import open_trainer
    from remix.training.finish import finish

    progress = Progress(Path(recipe_path).stem, recipe.run_dir, recipe.last_step, enabled=cluster.is_main)
    with progress, open_trainer(recipe, cluster, progress, **options) as trainer:
        if trainer.state.step >= recipe.last_step:
            progress.message(f"all {recipe.last_step} steps are done: set max_steps or steps higher to go on")
        trainer.fit()
        result = finish(trainer, recipe_path)
    _print(cluster, before_after_table(result))
    return result


def _one_after_the_other(recipe: Recipe, recipe_path: str, cluster: Cluster, **options: Any) -> dict[str, Any]:
    from remix.evaluation.continual_report import transfer_table
    from remix.training.continual import run_continual

    record, result = run_continual(recipe, recipe_path, cluster, **options)
    _print(cluster, transfer_table(record))
    return result


def _print(cluster: Cluster, table: RenderableType) -> None:
    from rich.console import Console

    if cluster.is_main:
        Console(markup=False, emoji=False).print(table)


def _check_run_dir(run_dir: Path, *, resume: bool) -> None:
    begun = any((run_dir / name).exists() and (run_dir / name).stat().st_size for name in BEGUN)
    if not resume and begun:
        raise ValueError(
            f"run_dir {run_dir} already holds a run: add --resume {run_dir} to go on with it, or choose another run_dir"
        )


if __name__ == "__main__":
    from remix.training.interruption import leave

    leave(main())
