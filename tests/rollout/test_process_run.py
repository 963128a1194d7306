"""A run whose engine is killed is the run that it would have been."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from remix.config import Recipe, changed_keys
from tests.rollout.faults import later
from tests.tiny import MIX, opened, tiny_recipe, weights_of
from tests.training.test_degenerate import metrics_of


def recipe_of(model: Path, run_dir: Path, **engine: Any) -> Recipe:
    changes = {
        "steps": 3, "phases": MIX, "eval": {"every": 1}, "optimizer": {"lr": 0.003},
        "rollout": {"engine": {"type": "vllm", "kv_cache_gib": 0.06, **engine}},
    }  # fmt: skip
    return tiny_recipe(model, run_dir, changes)


def test_an_engine_killed_while_it_samples_changes_nothing(vllm_model: Path, tmp_path: Path) -> None:
    with opened(recipe_of(vllm_model, tmp_path / "whole")) as t:
        t.fit()
        whole = weights_of(t)
    own = recipe_of(vllm_model, tmp_path / "killed", own_process=True)
    with opened(own) as t:
        engine, generate = t.sampler.engine, t.sampler.engine.generate

        def killed_in_step_1(*arguments: Any) -> Any:
            if t.state.step != 1 or engine.restarts:
                return generate(*arguments)
            pid = engine._child._process.pid
            os.kill(pid, signal.SIGSTOP)  # it has taken the call, and will not be done before it is killed
            with later(0.5, pid, signal.SIGKILL):
                return generate(*arguments)

        engine.generate = killed_in_step_1
        t.fit()
        killed = weights_of(t)
        wrong = {"model.nowhere": torch.zeros(1)}  # an error of the caller, and no fault
        with pytest.raises(ValueError, match=r"'model\.nowhere' is no weight of the checkpoint"):
            engine.sync(wrong.items())
        assert engine.restarts == 1
        assert engine._child is None
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")
    for step in range(3):
        one, other = (
            pq.read_table(tmp_path / run / f"rollouts/step={step:06d}.parquet") for run in ("whole", "killed")
        )
        assert one.equals(other)

    # The one may be resumed as the other.
    begun = recipe_of(vllm_model, tmp_path)
    assert changed_keys(begun, recipe_of(vllm_model, tmp_path, own_process=True, timeout=60.0, restarts=9)) == []
    (change,) = changed_keys(begun, recipe_of(vllm_model, tmp_path, enforce_eager=True))
    assert change == "rollout.engine.enforce_eager was False, is True"
