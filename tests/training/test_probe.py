"""Stale weights are caught at the first sync after an update, however small, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from remix.errors import TrainingError
from remix.models.adapters import checkpoint_weights
from remix.rollout.process import EngineProcess
from remix.tracking.stopwatch import Stopwatch
from remix.training.probe import SyncProbe
from remix.training.reincarnation import reincarnate
from tests.tiny import MIX, opened, tiny_recipe

SMALLEST = {"optimizer": {"lr": 1e-6}, "steps": 4}
"""An update that the tolerance of the probe would pass."""
ENGINE = {"type": "vllm", "kv_cache_gib": 0.06}


@contextmanager
def trainer_of(model: Path, run_dir: Path, changes: dict[str, Any] | None = None, **more: Any) -> Iterator[Any]:
    recipe = tiny_recipe(model, run_dir, {**SMALLEST, "rollout": {"engine": ENGINE}, **(changes or {})})
    with opened(recipe, **more) as trainer:
        yield trainer


def test_an_engine_that_ignores_the_smallest_update_or_is_one_behind_is_caught_at_once(
    vllm_model: Path, tmp_path: Path
) -> None:
    with trainer_of(vllm_model, tmp_path) as t:
        sync, late = t.sampler.engine.sync, []

        def behind(weights: Any) -> None:
            late.append([(name, tensor.clone()) for name, tensor in weights])
            sync(late[max(len(late) - 2, 0)])

        for stale in (lambda weights: None, behind):
            sync(checkpoint_weights(t.policy.module.lm))
            t.sampler.engine.sync, t.probe = stale, SyncProbe(t.recipe, t.policy)
            with pytest.raises(TrainingError, match=r"sync changed nothing in the vllm engine.*not hold the trained"):
                t.fit()
            assert t.state.step == 0  # within the first step


IGNORES = """
from remix.rollout import engine_worker
from remix.rollout.vllm import VLLMEngine
VLLMEngine.sync = lambda self, weights: [None for _ in weights] and None
engine_worker.main()
"""


def test_a_process_that_receives_weights_and_ignores_them_is_caught(
    vllm_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ignoring_worker.py").write_text(IGNORES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(EngineProcess, "WORKER", "ignoring_worker")
    changes = {"rollout": {"engine": {**ENGINE, "own_process": True}}}
    with trainer_of(vllm_model, tmp_path / "run", changes) as t:
        with pytest.raises(TrainingError, match="sync changed nothing"):
            t.fit()
        assert t.state.step == 0


class TestNoFalseAlarm:
    def test_honest_steps_and_a_resumed_run(self, vllm_model: Path, tmp_path: Path) -> None:
        with trainer_of(vllm_model, tmp_path, {"phases": MIX, "max_steps": 3}) as t:
            t.fit()
            # Between phases the policy stays what it is.
            reincarnate(t.recipe, t.policy, t.updater, t.replay, t.state)
            t.probe.check(t.sampler.engine, t.stream.take(0, 4))
        with trainer_of(vllm_model, tmp_path, {"phases": MIX}, resume=True) as t:
            t.fit()
            assert t.state.step == 4

    def test_a_step_that_trains_nothing(self, vllm_model: Path, tmp_path: Path) -> None:
        """Every response has the same reward, so every group is left out."""
        rewards = [{"type": "format", "pattern": "(?s).*"}]
        with trainer_of(vllm_model, tmp_path, {"rewards": rewards}) as t:
            before = {name: tensor.clone() for name, tensor in t.policy.weights(with_base=True).items()}
            t.fit()
            after = t.policy.weights(with_base=True)
            assert all(torch.equal(before[name], after[name]) for name in before)

    def test_an_update_too_small_for_the_engines_dtype(self, vllm_model: Path, tmp_path: Path) -> None:
        """The trainer's log-probs change with a float32 weight, of which the engine's bfloat16 copy knows nothing."""
        changes = {"model": {"dtype": "bfloat16"}, "rollout": {"engine": ENGINE, "probe_tolerance": 1.0}}
        with trainer_of(vllm_model, tmp_path, changes) as t:
            takes, doubts = t.probe._takes_weights, []
            t.probe._takes_weights = lambda *arguments: doubts.append(takes(*arguments)) or doubts[-1]
            t._sync(Stopwatch(lambda _: None))
            with torch.no_grad():
                t.policy.module.lm.model.norm.weight.mul_(1 + 1e-5)
            t._sync(Stopwatch(lambda _: None))
            assert doubts == [True]
