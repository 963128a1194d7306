"""What holds for every embedded base model and the script that builds it."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import GenerationConfig


def check_folder(base: Path, model: Any, tokenizer: Any, *, megabytes: float, suffixes: set[str]) -> None:
    """It is small, without pickles and training state, and its responses end as its tokenizer says."""
    files = [path for path in base.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= megabytes * 1e6
    assert {path.suffix for path in files} == suffixes
    assert model.dtype == torch.float32
    generation = GenerationConfig.from_pretrained(base)
    assert generation.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def card(base: Path) -> dict[str, tuple[float, float]]:
    """By row, the accuracy that the card states: sampled and greedy."""
    rows = re.findall(r"^\| ([\w ]+) \| (0\.\d\d|1\.00) \| (0\.\d\d|1\.00) \|$", (base / "README.md").read_text(), re.M)
    return {name: (float(sampled), float(greedy)) for name, sampled, greedy in rows}


def check_builder(
    script: ModuleType, reader: Any, shipped: Any, monkeypatch: pytest.MonkeyPatch, *, steps: int, batch: int
) -> list[float]:
    """A few small steps: the same seed gives the same weights, of the shipped architecture. Returns the losses."""
    monkeypatch.setattr(script, "BATCH_SIZE", batch)
    monkeypatch.setattr(script, "WARMUP_STEPS", 5)
    (first, losses), (again, _), (other, _) = (
        script.train(reader, count, seed) for count, seed in [(steps, 3), (steps, 3), (1, 4)]
    )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert {name: value.shape for name, value in first.state_dict().items()} == {
        name: value.shape for name, value in shipped.state_dict().items()
    }
    found: list[float] = losses
    return found
