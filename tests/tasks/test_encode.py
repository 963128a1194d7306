"""What the model reads, checked letter by letter with a tokenizer of characters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from remix.config import PromptConfig
from remix.tasks import encode
from remix.types import Prompt

LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(chat: str | None = None, begin: bool = False) -> PreTrainedTokenizerFast:
    """One token per character; with `begin`, a <s> before plain texts, as Llama has it."""
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate([*LETTERS, "<s>"])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begin:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(LETTERS))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=chat)


def prompt(content="1+1", name="p") -> Prompt:
    return Prompt(name, content, "2", "sums")


def read(prompts: list[Prompt]) -> list[str]:
    return ["".join([*LETTERS, "<s>"][token] for token in p.token_ids) for p in prompts]


def test_the_template_is_filled_literally():
    problem = r"\frac{1}{2} {0} {problem} %s"
    config = PromptConfig(template=r"Q: {problem} \boxed{}")
    (encoded,) = encode([prompt(problem)], tokenizer(), config)
    assert read([encoded]) == [rf"Q: {problem} \boxed{{}}"]
    assert (encoded.id, encoded.content, encoded.answer) == ("p", problem, "2")  # the problem stays as it was


def test_plain_text_has_the_special_tokens_of_the_tokenizer():
    assert read(encode([prompt()], tokenizer(begin=True), PromptConfig())) == ["<s>1+1"]


def test_system_before_plain_text():
    config = PromptConfig(system="Be {brief}.", template="{problem}=")
    assert read(encode([prompt()], tokenizer(), config)) == ["Be {brief}.\n\n1+1="]


def test_chat_template_where_there_is_one():
    config = PromptConfig(system="S", template="{problem}=")
    expected = "<system>S</><user>1+1=</><assistant>"
    for chat in ("auto", "always"):
        # No <s> in front: a chat template writes its own special tokens.
        chosen = config.model_copy(update={"chat": chat})
        assert read(encode([prompt(), prompt()], tokenizer(CHAT, begin=True), chosen)) == [expected] * 2
    never = config.model_copy(update={"chat": "never"})
    assert read(encode([prompt()], tokenizer(CHAT), never)) == ["S\n\n1+1="]


def test_ids_are_plain_integers():
    for chat in (None, CHAT):
        (encoded,) = encode([prompt()], tokenizer(chat), PromptConfig())
        assert all(type(token) is int for token in encoded.token_ids)


def test_conversations():
    turns = (
        {"role": "system", "content": "old"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    (text,) = read(encode([prompt(turns)], tokenizer(CHAT), PromptConfig(template="[{problem}]")))
    assert text == "<system>old</><user>a</><assistant>b</><user>[c]</><assistant>"
    (text,) = read(encode([prompt(turns)], tokenizer(CHAT), PromptConfig(system="new")))
    assert text == "<system>new</><user>a</><assistant>b</><user>c</><assistant>"
    with pytest.raises(ValueError, match=r"'p' is a conversation, which takes a chat template"):
        encode([prompt(turns)], tokenizer(), PromptConfig())
    with pytest.raises(ValueError, match=r"without a turn of the user"):
        encode([prompt(turns[:1])], tokenizer(CHAT), PromptConfig())


def test_always_without_a_template_is_refused():
    with pytest.raises(ValueError, match=r"prompt.chat is 'always', but the tokenizer has no chat template"):
        encode([prompt()], tokenizer(), PromptConfig(chat="always"))


def test_a_chat_template_without_a_system_role():
    chat = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
    with pytest.raises(ValueError, match=r"refuses a prompt: no system role; .*prompt.template"):
        encode([prompt()], tokenizer(chat), PromptConfig(system="S"))


def test_a_template_without_the_problem_is_refused():
    with pytest.raises(ValueError, match=r"does not contain \{problem\}"):
        encode([prompt()], tokenizer(), PromptConfig(template="Solve it."))


def test_overlong():
    prompts = [prompt("12345", "five"), prompt("123456", "six"), prompt("1", "one")]
    limit = PromptConfig(max_tokens=5)
    with pytest.raises(ValueError, match=r"'six' has 6 tokens, prompt.max_tokens is 5; raise it, or set"):
        encode(prompts, tokenizer(), limit)
    dropped = encode(prompts, tokenizer(), limit.model_copy(update={"overlong": "drop"}))
    assert [p.id for p in dropped] == ["five", "one"]
    cut = encode(prompts, tokenizer(), limit.model_copy(update={"overlong": "truncate"}))
    assert read(cut) == ["12345", "23456", "1"]  # its end stays
    with pytest.raises(ValueError, match=r"all 3 prompts are longer .* the shortest has 7 tokens"):
        encode(prompts, tokenizer(), PromptConfig(template="prompt{problem}", max_tokens=5, overlong="drop"))


def test_no_prompts():
    assert encode([], tokenizer(), PromptConfig()) == []


# --- images -------------------------------------------------------------------------------------------------------

PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def processor(chat: str | None = None) -> LlavaProcessor:
    """Two places for each image of 8 x 16 pixels, in patches of 8."""
    letters = tokenizer(chat)
    letters.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 8, "width": 16}
    pixels = CLIPImageProcessorPil(size=size, crop_size=size)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(pixels, letters, chat_template=chat, **options)


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[str, str]:
    paths = [str(tmp_path / f"{colour}.png") for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (16, 8), Path(path).stem).save(path)
    return paths[0], paths[1]


def seen(content: object, images: tuple[str, ...], written: str | None = None, **config: object) -> str:
    reader = processor(written)
    problem = replace(prompt(content), images=images)
    (encoded,) = encode([problem], reader.tokenizer, PromptConfig(**config), reader)
    names = {len(LETTERS) + 1: "@"}
    return "".join(names.get(token) or LETTERS[token] for token in encoded.token_ids)


def test_images_stand_before_the_text_or_where_it_says(pictures):
    assert seen("1+1", pictures[:1]) == "@@1+1"
    assert seen("1+1", pictures, template="Q: {problem}") == "@@@@Q: 1+1"
    assert seen("a<image>b<image>c", pictures, system="S") == "S\n\na@@b@@c"
    assert seen("1+1", ()) == "1+1"
    with pytest.raises(ValueError, match=r"'p' says <image> 1 times, but has 2 images: say it once for each"):
        seen("a<image>b", pictures)


def test_images_in_a_conversation_are_of_the_turn_that_asks(pictures):
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    asked = "<user>a</><assistant>b</><user>@@[c]</><assistant>"
    assert seen(turns, pictures[:1], PARTS, template="[{problem}]") == asked
    assert seen("a<image>b", pictures[:1], PARTS, system="S") == "<system>S</><user>a@@b</><assistant>"
    assert seen("a", (), PARTS) == "<user>a</><assistant>"
    assert seen("a", pictures[:1], PARTS, chat="never") == "@@a"


def test_no_end_of_a_prompt_with_images_is_cut_off(pictures):
    with pytest.raises(ValueError, match=r"'p' has 5 tokens, prompt.max_tokens is 4; raise it, or set .* to 'drop'\Z"):
        seen("1+1", pictures[:1], max_tokens=4, overlong="truncate")
    reader = processor()
    prompts = [replace(prompt("1+1"), images=pictures[:1]), replace(prompt("1", "short"), images=pictures[:1])]
    kept = encode(prompts, reader.tokenizer, PromptConfig(max_tokens=4, overlong="drop"), reader)
    assert [p.id for p in kept] == ["short"]


def test_a_text_model_reads_no_images(pictures):
    with pytest.raises(ValueError, match=r"'p' has images, and the model reads text alone: choose a vision-language"):
        encode([replace(prompt(), images=pictures[:1])], tokenizer(), PromptConfig())
