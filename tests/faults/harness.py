"""Real runs of the embedded GRPO recipe as subprocesses, small and quick, with or without a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.tiny import EMBEDDED, ROOT

STEPS = 3
RECIPE = str(EMBEDDED / "grpo.yaml")
SMALL = (
    "batch.prompts=8",
    "eval.prompts=8",
    "eval.every=0",
    "checkpoint.every=1",
    f"max_steps={STEPS}",
    "log.trackers=[]",
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SECONDS = 300


def command(run_dir: Path, *words: str, plant: Sequence[str] = (), resume: bool = False) -> list[str]:
    """Of a run in this directory; `words` are overrides and options, the last of a key counts."""
    module = ["-m", "tests.faults.plant", *plant, "--"] if plant else ["-m", "remix.train"]
    own = ["--resume", str(run_dir)] if resume else [f"run_dir={run_dir}"]
    return [sys.executable, *module, RECIPE, *SMALL, *words, *own]


def train(
    run_dir: Path, *words: str, plant: Sequence[str] = (), resume: bool = False, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """A run to its end, which has to be this exit status, and no stack trace."""
    done = subprocess.run(
        command(run_dir, *words, plant=plant, resume=resume),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Without times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "final" / "model.safetensors").read_bytes()


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Nothing was lost on the way: the same metrics, shards and final weights."""
    assert metrics(run_dir) == metrics(other)
    shards = [{path.name: path.read_bytes() for path in (of / "rollouts").iterdir()} for of in (run_dir, other)]
    assert shards[0] == shards[1]
    assert weights(run_dir) == weights(other)
