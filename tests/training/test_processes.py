"""Two processes through `accelerate launch` are the same run as one without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from remix import train
from remix.config import Recipe, dump_recipe
from remix.replay import ReplayBuffer, logged_steps, read_shards
from scripts.prove_resume import TWO_PROCESSES
from tests.test_replay import assert_same
from tests.tiny import MIX, ROOT, opened, tiny_recipe
from tests.training.test_degenerate import GAE, metrics_of


def launch(recipe: Recipe, folder: Path) -> None:
    """With two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "accelerate.yaml").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    command += ["-m", "remix.train", str(folder / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with (folder / "output.txt").open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            status = process.wait(timeout=400)
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
    train.run(tiny_recipe(tiny_model, tmp_path / "run1", changes))
    launch(tiny_recipe(tiny_model, tmp_path / "run2", changes), tmp_path / "launch")
    final = {processes: load_file(tmp_path / f"run{processes}" / "final" / "model.safetensors") for processes in (1, 2)}
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
    # A process alone reads what both have written.
    with opened(tiny_recipe(tiny_model, tmp_path / "run2", changes), resume=True) as trainer:
        draw = {"step": 2, "window": 2, "distribution": "uniform"}
        drawn = trainer.replay.draw(9, **draw, rng=np.random.default_rng(0))
        known = ReplayBuffer(2)
        for step, paths in shards[2].items():
            known.add(read_shards(paths), step)
        expected = known.draw(9, **draw, rng=np.random.default_rng(0))
        assert trainer.replay.versions == [0, 1]
        assert [group.prompt.id for group in drawn] == [group.prompt.id for group in expected]
        for one_group, other in zip(drawn, expected, strict=True):
            assert_same(one_group, other)
    start = load_file(tiny_model / "model.safetensors")
    for name, weights in final[1].items():
        moved = (weights - start[name]).abs().max()
        assert (weights - final[2][name]).abs().max() < 0.01 * moved, name
        assert torch.isfinite(weights).all()
