"""Which run `--resume` goes on with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remix.config import changed_keys, dump_recipe, load_recipe
from remix.training.resume import newest_run, resolve
from tests.tiny import EMBEDDED

RECIPE = str(EMBEDDED / "grpo.yaml")


def leave(run_dir: Path, when: float, *overrides: str) -> Path:
    """What a run that wrote its last checkpoint then has left."""
    checkpoint = run_dir / "checkpoints" / "step=000002"
    checkpoint.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_recipe(load_recipe(RECIPE, [f"run_dir={run_dir}", *overrides])))
    for path in (run_dir / "recipe.yaml", checkpoint):
        os.utime(path, (when, when))
    return run_dir


def test_auto_is_its_own_run_or_the_newest_of_the_same_recipe(tmp_path: Path) -> None:
    wanted = load_recipe(RECIPE, [f"run_dir={tmp_path / 'mine'}"])
    assert newest_run(wanted) is None
    leave(tmp_path / "mine-1", 1000.0)
    newest = leave(tmp_path / "mine-2", 2000.0, "max_steps=3", "log.completions=1")  # how far and how loud is free
    leave(tmp_path / "other", 3000.0, "seed=1")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "recipe.yaml").write_text("a: recipe of another version\n")
    assert newest_run(wanted) == newest
    # In its own directory it may have another recipe: that is for the resumption to refuse, key by key.
    own = leave(tmp_path / "mine", 500.0, "optimizer.lr=1")
    assert newest_run(wanted) == own


def test_what_is_asked(tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path / 'mine'}"
    assert resolve([RECIPE, "seed=1"], None) == (RECIPE, ["seed=1"], False)
    assert resolve([RECIPE, run_dir], "auto") == (RECIPE, [run_dir], False)
    own = leave(tmp_path / "mine", 1000.0)
    assert resolve([RECIPE, run_dir], "auto") == (RECIPE, [run_dir, run_dir], True)
    assert resolve(["max_steps=9"], str(own)) == (str(own / "recipe.yaml"), ["max_steps=9", run_dir], True)
    with pytest.raises(ValueError, match="no run there"):
        resolve([], str(tmp_path / "none"))
    with pytest.raises(ValueError, match="one recipe at a time"):
        resolve([RECIPE, RECIPE], None)


def test_where_and_how_an_engine_runs_may_change_and_what_it_computes_may_not() -> None:
    begun = load_recipe(RECIPE, ["rollout.engine={type: vllm}"])
    moved = load_recipe(RECIPE, ["rollout.engine={type: vllm, own_process: true, timeout: 60, restarts: 9}"])
    other = load_recipe(RECIPE, ["rollout.engine={type: vllm, enforce_eager: true}"])
    assert changed_keys(begun, moved) == []
    assert changed_keys(begun, other) == ["rollout.engine.enforce_eager was False, is True"]
