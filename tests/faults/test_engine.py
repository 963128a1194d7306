"""An engine that dies while it samples, and one that does not get the weights."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from tests.faults.harness import ENVIRONMENT, SECONDS, assert_same_run, command, train
from tests.tiny import ROOT

VLLM = "rollout.engine={type: vllm, kv_cache_gib: 0.06}"


def test_an_engine_that_is_killed_is_started_again(tmp_path: Path) -> None:
    """Its prompts are sampled again with the same seeds: nothing differs from a run in which it lived."""
    train(tmp_path / "unharmed", VLLM)
    run_dir, own_process = tmp_path / "run", VLLM.replace("}", ", own_process: true}")
    process = subprocess.Popen(
        command(run_dir, own_process), cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    while "step 1/" not in said:
        said += process.stdout.readline()
    (engine,) = [p for p in psutil.Process(process.pid).children() if "remix.rollout.engine_worker" in p.cmdline()]
    engine.suspend()  # so that it is in the middle of a call for certain
    time.sleep(1.0)
    engine.kill()
    rest, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert "process was ended by SIGKILL while" in rest
    assert_same_run(run_dir, tmp_path / "unharmed")


def test_weights_that_do_not_arrive_are_caught_in_the_same_step(tmp_path: Path) -> None:
    """Also where the update is so small that log-probs barely move."""
    done = train(tmp_path / "run", VLLM, "optimizer.lr=1e-6", plant=["deaf_engine"], status=1)
    assert "the weight sync changed nothing in the vllm engine" in done.stderr
    assert "step 1/" not in done.stdout
