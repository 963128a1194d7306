"""Two processes through `accelerate launch` are the same run as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from remix.config import Recipe, dump_recipe
from remix.replay import logged_steps
from scripts.prove_resume import TWO_PROCESSES
from tests.tiny import MIX, ROOT, tiny_recipe
from tests.training.test_degenerate import GAE, metrics_of


def launch(recipe: Recipe, folder: Path, *, processes: int) -> None:
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes == 1:
        command += ["--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml")]
    else:
        (folder / "accelerate.yaml").write_text(TWO_PROCESSES)
        command += ["--config_file", str(folder / "accelerate.yaml")]
        environment["ACCELERATE_USE_CPU"] = "true"
    command += ["-m", "remix.train", str(path)]
    with (folder / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            status = process.wait(timeout=200)
        except subprocess.TimeoutExpired:
            process.terminate()  # a rank that hangs says so when its grace is over
            status = process.wait(timeout=60)
        output.seek(0)
        assert status == 0, output.read()[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("advantage", [{"type": "grpo"}, GAE], ids=["grpo", "gae"])
def test_two_processes_train_the_same_model_as_one(tiny_model: Path, tmp_path: Path, advantage: dict[str, Any]) -> None:
    # An odd number of prompts, so that the shares are unequal; SGD-like epsilon, so that rounding stays rounding.
    changes = {
        "steps": 2,
        "phases": MIX,
        "batch": {"prompts": 7, "minibatches": 2, "tokens_per_microbatch": 128},
        "advantage": advantage,
        "optimizer": {"eps": 1e-3},
    }
    final = {}
    for processes in (1, 2):
        run_dir = tmp_path / f"run{processes}"
        launch(tiny_recipe(tiny_model, run_dir, changes), tmp_path / f"launch{processes}", processes=processes)
        final[processes] = load_file(run_dir / "final" / "model.safetensors")
    one, two = metrics_of(tmp_path / "run1"), metrics_of(tmp_path / "run2")
    for alone, together in zip(one, two, strict=True):
        for name in ("rollouts", "batch/rollouts", "batch/replayed", "reward/mean", "tokens/lag=0", "eval/pass@1"):
            assert alone.get(name) == together.get(name)
        for name in ("loss/policy", "kl/update", "entropy", "ess", "grad_norm/policy"):
            assert alone[name] == pytest.approx(together[name], rel=1e-3, abs=1e-6)
    shards = {processes: logged_steps(tmp_path / f"run{processes}") for processes in (1, 2)}
    for step in range(2):
        logs = [
            pa.concat_tables([pq.read_table(path) for path in shards[processes][step]])
            .select(["group", "sample", "prompt_id", "response_ids", "reward", "replayable"])
            .sort_by([("group", "ascending"), ("sample", "ascending")])
            for processes in (1, 2)
        ]
        assert [len(shards[processes][step]) for processes in (1, 2)] == [1, 2], "each process writes its part"
        assert logs[0].equals(logs[1]) or step, "the first step's responses are the same, and so is their order"
        assert logs[0].num_rows == logs[1].num_rows
        tokens = [sum(map(len, pq.read_table(path)["response_ids"].to_pylist())) for path in shards[2][step]]
        longest = max(map(len, logs[1]["response_ids"].to_pylist())) + 8
        assert abs(tokens[0] - tokens[1]) <= 4 * longest, "about as many tokens"
    start = load_file(tiny_model / "model.safetensors")
    for name, weights in final[1].items():
        moved = (weights - start[name]).abs().max()
        assert (weights - final[2][name]).abs().max() < 0.01 * moved, name
        assert torch.isfinite(weights).all()
