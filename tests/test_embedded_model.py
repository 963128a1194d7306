"""The embedded base model as shipped, and the script that builds it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from remix.tasks import arithmetic
from scripts import build_embedded_model as script
from tests.embedded_bases import card, check_builder, check_folder
from tests.tiny import EMBEDDED

BASE = EMBEDDED / "base"
BAND = (0.15, 0.35)
"""Sampled pass@1 from which reinforcement learning has something to bring out and room to do so."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE)


def held_out(each: int) -> list[str]:
    """Test problems of every kind and number of terms in the corpus."""
    return [
        problem
        for kind in script.KINDS
        for terms in script.TERMS
        for problem in islice(arithmetic.problems(kind, terms, "test", seed=0), each)
    ]


def test_the_directory_is_small_and_complete(model: Any, tokenizer: Any) -> None:
    check_folder(BASE, model, tokenizer, megabytes=2.5, suffixes={".safetensors", ".json", ".md"})


def test_the_tokenizer_gives_back_every_text(tokenizer: Any) -> None:
    for character in script.CHARACTERS:
        assert len(tokenizer.encode(character)) == 1
        assert tokenizer.decode(tokenizer.encode(character)) == character
    for text in [*held_out(50), "11;15;24#24", "  it's 3,  or\n\n4 . ", script.CHARACTERS * 2]:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.encode("1é2") == tokenizer.encode("12")  # outside the vocabulary: dropped
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.chat_template is None


def test_it_is_as_good_as_its_card_says(model: Any, tokenizer: Any) -> None:
    stated = card(BASE)
    assert [*stated] == ["sum of 3", "sum of 4", "sum of 5", "mean"]
    assert BAND[0] < stated["mean"][0] < BAND[1]
    # 264 problems, 2 samples each: a standard error of about .02.
    sampled = script.accuracy(model, tokenizer, held_out(88), samples=2, seed=0)
    assert sampled == pytest.approx(stated["mean"][0], abs=0.08)


def test_the_builder_repeats_itself_and_learns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = check_builder(script, script.make_tokenizer(), model, monkeypatch, steps=40, batch=16)
    # Untrained, every one of 98 tokens is about as likely: ln 98 = 4.58 nats.
    assert 4 < losses[0] < 6
    assert losses[-1] < 2.5
