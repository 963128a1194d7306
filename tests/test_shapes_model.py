"""The embedded vision-language base as shipped, and the script that builds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from remix.tasks import shapes
from remix.tasks.images import open_image
from scripts import build_shapes_model as script
from tests.embedded_bases import card, check_builder, check_folder
from tests.tiny import EMBEDDED

BASE = EMBEDDED / "shapes_base"
BAND = (0.35, 0.8)
"""Mean of sampled pass@1 from which reinforcement learning has something to bring out and room to do so."""


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(BASE)


def test_the_directory_is_small_and_complete(model: Any, processor: Any) -> None:
    suffixes = {".safetensors", ".json", ".jinja", ".md"}
    check_folder(BASE, model, processor.tokenizer, megabytes=6, suffixes=suffixes)


def test_every_question_and_answer_is_in_its_words(processor: Any) -> None:
    for kind in shapes.KINDS:
        for text in (shapes.question(kind), *shapes.answers(kind)):
            ids = processor.tokenizer.encode(text)
            assert processor.tokenizer.unk_token_id not in ids
            assert processor.tokenizer.encode(f"  {text.upper()}\n") == ids
        for answer in shapes.answers(kind):
            (answer_id,) = processor.tokenizer.encode(answer)
            ids = [answer_id, processor.tokenizer.eos_token_id]
            assert processor.tokenizer.decode(ids, skip_special_tokens=True) == answer


def test_a_chat_becomes_one_turn_with_its_picture(model: Any, processor: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "where is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    assert text == "<user><image>where is it?<assistant>"
    plain = processor.tokenizer.apply_chat_template([{"role": "user", "content": "where is it?"}], tokenize=False)
    assert plain == "<user>where is it?"
    picture = open_image("shapes:where/test/0/0")
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    # 32 / 8 = 4 patches a side; the same ids as those that the model was built with.
    assert ids.count(model.config.image_token_id) == 16
    assert ids == processor.tokenizer.encode("<user>" + 16 * "<image>" + "where is it?<assistant>")
    assert torch.allclose(inputs["pixel_values"], script.pixel_values([picture]), atol=1e-6)
    assert (inputs["pixel_values"].min(), inputs["pixel_values"].max()) >= (-1, 0.5)


def test_it_is_as_good_as_its_card_says(model: Any, processor: Any) -> None:
    stated = card(BASE)
    assert [*stated] == [*shapes.KINDS, "mean"]
    assert BAND[0] < stated["mean"][0] < BAND[1]
    sampled = 0.0
    for kind in shapes.KINDS:
        prompts = shapes.make_prompts(kind, "test", 128, seed=0)
        # The card's own pictures: only rounding could change a word.
        assert script.accuracy(model, processor, prompts, samples=0, seed=0) == pytest.approx(stated[kind][1], abs=0.05)
        sampled += script.accuracy(model, processor, prompts, samples=1, seed=0) / len(shapes.KINDS)
    # 1280 single draws: a standard error of .013.
    assert sampled == pytest.approx(stated["mean"][0], abs=0.06)


def test_the_builder_repeats_itself_and_learns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = check_builder(script, script.make_processor(), model, monkeypatch, steps=25, batch=8)
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_positions_tell_every_patch_from_the_others() -> None:
    positions = script.sine_positions(4, 128)
    assert positions.shape == (17, 128)
    assert positions[0].abs().sum() == 0
    assert torch.pdist(positions).min() > 0.5
    # The same row: the first half agrees; the same column: the second.
    grid = positions[1:].view(4, 4, 2, 64)
    assert torch.equal(grid[2, 0, 0], grid[2, 3, 0])
    assert torch.equal(grid[0, 2, 1], grid[3, 2, 1])


def test_captions_say_what_is_on_a_picture_in_known_words() -> None:
    said = {
        script.caption(shapes.scene(f"shapes:{kind}/train/0/{index}")) for kind in shapes.KINDS for index in range(40)
    }
    tokenizer = script.make_processor().tokenizer
    assert all(tokenizer.unk_token_id not in tokenizer.encode(text) for text in said)
    one = shapes.Scene(0, (shapes.Figure("triangle", "red", 16, 22, 5, turn=1),), "right")
    assert script.caption(one) == "a red triangle at the bottom pointing to the right"
    pair = shapes.Scene(0, (shapes.Figure("ring", "red", 23, 9, 7), shapes.Figure("ring", "blue", 8, 9, 3)), "red")
    assert script.caption(pair) == "a small blue ring at the left and a big red at the right"
    several = [shapes.Figure("circle", colour, 5, 5, 3) for colour in ("white", "cyan", "cyan")]
    assert script.caption(shapes.Scene(0, tuple(several), "white")) == "3 cyan circle 1 of them is white"
    assert script.caption(shapes.Scene(0, tuple(several[1:]), "white")) == "2 cyan circle"
