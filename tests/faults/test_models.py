"""A model or data that are not those that the run was begun with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.faults.harness import train
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


def test_a_base_under_an_adapter_that_was_exchanged(tmp_path: Path) -> None:
    model, lora = tmp_path / "model", "adapter.type=lora"
    shutil.copytree(EMBEDDED / "base", model)
    train(tmp_path / "run", f"model.path={model}", lora, "max_steps=1")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    done = train(tmp_path / "run", f"model.path={model}", lora, resume=True, status=2)
    assert "the frozen weights are not those that the run was begun with" in done.stderr
