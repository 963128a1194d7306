"""A model or data that are not those that the run was begun with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.faults.harness import metrics, train
from tests.tiny import EMBEDDED


def test_a_tokenizer_that_does_not_match(tmp_path: Path) -> None:
    """Two characters change places in the vocabulary: every prompt would read as another."""
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED / "base", model)
    train(tmp_path / "run", f"model.path={model}", "max_steps=1")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = train(tmp_path / "run", f"model.path={model}", resume=True, status=2)
    assert "the tokenizer and the training prompts are not those that the run was begun with" in done.stderr


def test_a_changed_recipe_is_asked_about(tmp_path: Path) -> None:
    run_dir, changed = tmp_path / "run", ("optimizer.lr=1e-6", "batch.minibatches=1")
    train(run_dir, "max_steps=1")
    done = train(run_dir, *changed, resume=True, status=2)
    assert "batch.minibatches was 2, is 1; optimizer.lr was 7e-05, is 1e-06" in done.stderr
    assert "--allow-changed" in done.stderr
    done = train(run_dir, *changed, "--allow-changed", resume=True)
    assert "no longer exactly the run it was: batch.minibatches was 2, is 1" in " ".join(done.stdout.split())
    assert [line["updates"] for line in metrics(run_dir)] == [2, 1, 1]
    state = json.loads((run_dir / "checkpoints" / "latest" / "state.json").read_text())
    assert state["state"]["changes"] == [
        "step 1: batch.minibatches was 2, is 1",
        "step 1: optimizer.lr was 7e-05, is 1e-06",
    ]


def test_a_base_under_an_adapter_that_was_exchanged(tmp_path: Path) -> None:
    model, lora = tmp_path / "model", "adapter.type=lora"
    shutil.copytree(EMBEDDED / "base", model)
    train(tmp_path / "run", f"model.path={model}", lora, "max_steps=1")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    done = train(tmp_path / "run", f"model.path={model}", lora, resume=True, status=2)
    assert "the frozen weights are not those that the run was begun with" in done.stderr
