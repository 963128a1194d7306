"""Memory does not grow with the steps: neither the process nor the tensors that live in it.

In a process of its own, since what earlier tests have given back would hide what is not given back here.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch

from tests.tiny import ROOT, opened, tiny_recipe

STEPS = 200
COUNTED = (60, 100, 160, 200)
SLACK = 4 << 20
"""Bytes by which the process may grow from steps 60-100 to steps 160-200: 40 KiB a step. Fragments of the heap come to
a quarter of it; a kept copy of the trained weights would be 270 KB a step, and rollouts are counted as tensors."""
CHANGES: dict[str, Any] = {
    "steps": STEPS,
    "phases": [{"type": "mix_policy", "off_policy_fraction": 0.5, "window": 4, "utd_ratio": 1}],
    "kl": {"weight": 0.1, "lambda_schedule": {"start": 0.9, "hold": 0, "every": 20, "drop": 0.1, "floor": 0.3}},
    # As many rollouts in every step, so that as many tensors live after each.
    "rollout": {"group_size": 2, "max_tokens": 6, "drop_uniform_groups": False},
    "batch": {"prompts": 2, "minibatches": 1},
    "rewards": [{"type": "length", "free_tokens": 1, "max_tokens": 6}],
    "eval": {"every": 50, "prompts": 2, "before": False},
    "checkpoint": {"every": 50},
    "log": {"trackers": []},
}


def observe(model: Path, run_dir: Path, out: Path) -> None:
    """A run, and what it held as each step ended: bytes of the process, and at some the tensors that live."""
    rows: list[dict[str, int]] = []
    process = psutil.Process()
    with opened(tiny_recipe(model, run_dir, CHANGES)) as trainer:
        tell = trainer.progress.update

        def update(step: int, *told: Any) -> None:
            row = {"step": step, "rss": process.memory_info().rss}
            if step in COUNTED:
                gc.collect()
                tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
                row |= {"tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors)}
            rows.append(row)
            tell(step, *told)

        trainer.progress.update = update
        trainer.fit()
        assert trainer.replay.versions == [STEPS - 4, STEPS - 3, STEPS - 2, STEPS - 1]
    out.write_text(json.dumps(rows))


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_memory_is_flat_over_200_steps(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.test_flat_memory", tiny_model, tmp_path / "run", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "out").read_text())
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    early, late = (median(row["rss"] for row in rows if a <= row["step"] <= b) for a, b in ((60, 100), (160, 200)))
    counted = [row for row in rows if "tensors" in row]
    assert late - early <= SLACK, f"{(late - early) / 2**20:.1f} MiB more, {counted}"
    assert len({row["tensors"] for row in counted}) == 1, counted
    # Responses have different lengths; what is kept of them is a few bytes a token.
    sizes = [row["bytes"] for row in counted]
    assert max(sizes) - min(sizes) < 64 << 10, counted


if __name__ == "__main__":
    observe(*map(Path, sys.argv[1:]))
