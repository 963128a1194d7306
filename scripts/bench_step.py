"""Seconds of a training step, split by stage; tokens per second; peak memory.

    python scripts/bench_step.py [RECIPE [key=value ...]] [--steps N]

Runs N steps after one to warm up, through the trainer itself, in a temporary run directory.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path
from statistics import median

STAGES = {"sampling": "rollout", "scoring": "scoring", "anchors": "anchors", "updating": "update", "syncing": "sync"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a training step, split by stage.")
    parser.add_argument("recipe", nargs="?", default="recipes/embedded/remix_grpo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_intermixed_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    import torch
    from rich.console import Console
    from rich.table import Table

    from remix.config import load_recipe
    from remix.tracking.progress import Progress
    from remix.training.build import open_trainer
    from remix.training.distributed import Cluster

    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"run_dir={folder}/run", "eval.every=0", "eval.prompts=1", "checkpoint.every=0", "log.trackers=[]"]
        recipe = load_recipe(options.recipe, [*options.overrides, *fixed, f"max_steps={options.steps + 1}"])
        progress = Progress("bench", recipe.run_dir, recipe.last_step, enabled=False)
        with Cluster() as cluster, open_trainer(recipe, cluster, progress, resume=False) as trainer:
            trainer.fit()
        from remix.tracking.run_log import read_metrics

        lines = read_metrics(Path(recipe.run_dir))[1:]

    seconds = {name: median(line.get(f"time/{stage}", 0.0) for line in lines) for stage, name in STAGES.items()}
    whole = median(line["time/step"] for line in lines)
    table = Table("stage", "seconds", "share", title=f"a step of {options.recipe}, median of {len(lines)}")
    for name, spent in [*seconds.items(), ("all", whole)]:
        table.add_row(name, f"{spent:.3f}", f"{spent / whole:.0%}")
    console = Console()
    console.print(table)
    sampled, trained = (median(line.get(f"tokens/{kind}", 0.0) for line in lines) for kind in ("sampled", "trained"))
    ahead, hidden = (median(line.get(f"time/{name}", 0.0) for line in lines) for name in ("ahead", "ahead_hidden"))
    if ahead:
        console.print(f"beside it the next step is sampled and scored: {ahead:.3f} s, {hidden:.0%} of them hidden")
    sampling = ahead or seconds["rollout"]
    console.print(f"sampled {sampled / sampling:,.0f} tokens/s, trained {trained / seconds['update']:,.0f}/s")
    console.print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB (host)")
    if torch.cuda.is_available():
        console.print(
            f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB ({torch.cuda.get_device_name()})"
        )
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
