"""The embedded base model as shipped, and the script that builds it."""

from __future__ import annotations

import importlib.util
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from remix.tasks import arithmetic

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes/embedded/base"
BAND = (0.15, 0.35)
"""Sampled pass@1 from which reinforcement learning has something to bring out and room to do so."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_embedded_model", ROOT / "scripts/build_embedded_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE)


def held_out(script: ModuleType, each: int) -> list[str]:
    """Test problems of every kind and number of terms in the corpus."""
    return [
        problem
        for kind in script.KINDS
        for terms in script.TERMS
        for problem in islice(arithmetic.problems(kind, terms, "test", seed=0), each)
    ]


def test_the_directory_is_small_and_complete(model: Any, tokenizer: Any) -> None:
    files = [path for path in BASE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2.5e6
    assert {path.suffix for path in files} == {".safetensors", ".json"}  # no pickles, no training state
    assert model.dtype == torch.float32
    generation = GenerationConfig.from_pretrained(BASE)
    assert generation.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id


def test_the_tokenizer_gives_back_every_text(script: ModuleType, tokenizer: Any) -> None:
    for character in script.CHARACTERS:
        assert len(tokenizer.encode(character)) == 1
        assert tokenizer.decode(tokenizer.encode(character)) == character
    for text in [*held_out(script, 50), "11;15;24#24", "  it's 3,  or\n\n4 . ", script.CHARACTERS * 2]:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.encode("1é2") == tokenizer.encode("12")  # outside the vocabulary: dropped
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.chat_template is None


def test_it_is_right_about_one_time_in_four(script: ModuleType, model: Any, tokenizer: Any) -> None:
    # 6 cells of 88 problems, 2 samples each: a standard error of about .015.
    pass_at_1 = script.pass_at_1(model, tokenizer, held_out(script, 88), samples=2, seed=0)
    assert BAND[0] < pass_at_1 < BAND[1]


def test_the_builder_repeats_itself_and_learns(script: ModuleType, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few small steps: the same seed gives the same weights, of the shipped architecture, and the loss falls."""
    monkeypatch.setattr(script, "BATCH_SIZE", 16)
    (first, losses), (again, _), (other, _) = (
        script.train(script.make_tokenizer(), steps, seed) for steps, seed in [(40, 3), (40, 3), (1, 4)]
    )
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert {name: value.shape for name, value in first.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    # Untrained, every one of 98 tokens is about as likely: ln 98 = 4.58 nats.
    assert 4 < losses[0] < 6
    assert losses[-1] < 2.5
