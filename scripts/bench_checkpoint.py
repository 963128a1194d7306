"""Seconds and bytes of a checkpoint: what saving costs a run, and loading a resumed one.

    python scripts/bench_checkpoint.py [RECIPE] [key=value ...] [--repeat N]

Trains one step of the recipe, so that everything is there that a checkpoint holds, then saves and loads through the
trainer itself. Whole files are hashed and on the disk when a save returns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and bytes of a checkpoint.")
    parser.add_argument("recipe", nargs="?", default="recipes/embedded/remix_ppo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_intermixed_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from rich.console import Console
    from rich.table import Table

    from remix import checkpoint
    from remix.config import load_recipe
    from remix.tracking.progress import Progress
    from remix.tracking.run_log import read_metrics
    from remix.training.build import open_trainer
    from remix.training.distributed import Cluster

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(options.repeat):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return median(times)

    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk of the working directory, as runs/ is
        fixed = [f"run_dir={folder}/run", "max_steps=2", "eval.every=0", "eval.prompts=1", "checkpoint.keep=1"]
        recipe = load_recipe(options.recipe, [*options.overrides, *fixed, "log.trackers=[]"])
        progress = Progress("bench", recipe.run_dir, recipe.last_step, enabled=False)
        with Cluster() as cluster, open_trainer(recipe, cluster, progress, resume=False) as trainer:
            trainer.fit()
            saving = seconds(trainer.save)
        newest = checkpoint.saved(Path(recipe.run_dir))[-1]
        loading = seconds(lambda: checkpoint.load(newest))
        sections = checkpoint.load(newest).tensors
        step = read_metrics(Path(recipe.run_dir))[-1]["time/step"]
        size = sum(file.stat().st_size for file in newest.iterdir())

    table = Table("part", "MB", "tensors", title=f"a checkpoint of {options.recipe}")
    for name, tensors in sections.items():
        held = sum(tensor.nbytes for tensor in tensors.values())
        table.add_row(name, f"{held / 1e6:,.2f}", f"{len(tensors):,}")
    table.add_row("whole, on disk", f"{size / 1e6:,.2f}", "")
    console = Console()
    console.print(table)
    console.print(f"save {saving:.3f} s ({size / 1e6 / saving:,.0f} MB/s), load and check {loading:.3f} s")
    console.print(
        f"a step takes {step:.2f} s: saving every {recipe.checkpoint.every} steps adds "
        f"{saving / (step * max(recipe.checkpoint.every, 1)):.2%}"
    )


if __name__ == "__main__":
    main()
