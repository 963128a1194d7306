"""From a problem to the token ids that the model reads, its images' places included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from jinja2 import TemplateError

from remix.config import PromptConfig
from remix.tasks.images import open_image
from remix.types import Message, Prompt

PLACEHOLDER = "{problem}"
IMAGE = "<image>"
"""Where an image stands in the text of a prompt that has some; without it they stand before the text."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any

    def __call__(self, text: list[str], /) -> Any: ...

    def apply_chat_template(self, conversation: list[list[Message]], /, **options: Any) -> Any: ...


class Processor(Protocol):
    """What is used of a transformers processor: text and images in, token ids with the images' places out."""

    image_token: str
    chat_template: Any

    def __call__(self, *, text: list[str], images: list[list[Any]]) -> Any: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], /, **options: Any) -> Any: ...


def encode(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, config: PromptConfig, processor: Processor | None = None
) -> list[Prompt]:
    """The prompts with their `token_ids`, in order; fewer than were given only under `overlong: drop`.

    Prompts with images need the model's `processor`; each image is opened once and not kept.
    """
    if PLACEHOLDER not in config.template:
        raise ValueError(f"prompt.template does not contain {PLACEHOLDER}, so every prompt would be the same; add it")
    if not prompts:
        return []
    chat = _uses_chat(tokenizer, config)
    pictured = next((prompt for prompt in prompts if prompt.images), None)
    if pictured is not None and processor is None:
        raise ValueError(f"prompt '{pictured.id}' has images, and the model reads text alone: {NO_IMAGES}")
    if processor is not None and (chat or pictured):
        ids = [_encode_seen(prompt, tokenizer, config, processor, chat=chat) for prompt in prompts]
    elif chat:
        ids = _encode_chats([_conversation(prompt, config) for prompt in prompts], tokenizer)
    else:
        ids = [list(row) for row in tokenizer([_text(prompt, config) for prompt in prompts])["input_ids"]]
    fitted = [(prompt, _fit(prompt, row, config)) for prompt, row in zip(prompts, ids, strict=True)]
    kept = [replace(prompt, token_ids=row) for prompt, row in fitted if row is not None]
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts are longer than prompt.max_tokens ({config.max_tokens}) and were dropped; "
            f"the shortest has {min(map(len, ids))} tokens: raise it"
        )
    return kept


def _uses_chat(tokenizer: Tokenizer, config: PromptConfig) -> bool:
    if config.chat == "always" and not tokenizer.chat_template:
        raise ValueError(
            "prompt.chat is 'always', but the tokenizer has no chat template; "
            "use an instruct model's tokenizer, or set prompt.chat to 'auto' or 'never'"
        )
    return config.chat != "never" and bool(tokenizer.chat_template)


NO_IMAGES = "choose a vision-language model (of transformers' AutoModelForImageTextToText) or a task without images"


def _encode_seen(
    prompt: Prompt, tokenizer: Tokenizer, config: PromptConfig, processor: Processor, *, chat: bool
) -> list[int]:
    """By the processor, which puts as many tokens in the place of an image as the model will see of it."""
    images = [open_image(reference) for reference in prompt.images]
    if not chat and not images:
        return list(tokenizer([_text(prompt, config)])["input_ids"][0])
    if chat:
        turns = _conversation(prompt, config)
        asked = max(place for place, turn in enumerate(turns) if turn["role"] == "user")
        conversation = [
            {"role": turn["role"], "content": _parts(prompt, turn["content"], images if place == asked else [])}
            for place, turn in enumerate(turns)
        ]
        with _template_errors():
            encoded = processor.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=True
            )
    else:
        shown = [
            str(processor.image_token) if part["type"] == "image" else part["text"]
            for part in _parts(prompt, _text(prompt, config), images)
        ]
        encoded = processor(text=["".join(shown)], images=[images])
    return [int(token) for token in encoded["input_ids"][0]]


def _parts(prompt: Prompt, text: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    """The parts of a turn as chat templates know them: images, and the text around them."""
    pieces = text.split(IMAGE) if images else [text]
    if len(pieces) not in (1, 1 + len(images)):
        raise ValueError(
            f"prompt '{prompt.id}' says {IMAGE} {len(pieces) - 1} times, but has {len(images)} images: say it once for "
            "each, or not at all"
        )
    if len(pieces) == 1:
        pieces = [*[""] * len(images), text]
    shown = [{"type": "image", "image": image} for image in images]
    texts = [{"type": "text", "text": piece} for piece in pieces]
    # As they alternate, beginning and ending with a text; empty ones are none.
    both = [part for pair in zip(texts, shown, strict=False) for part in pair] + texts[len(images) :]
    return [part for part in both if part.get("text") != ""]


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a prompt: {error}; "
            "where it knows no system role, put prompt.system into prompt.template"
        ) from error


def _encode_chats(conversations: list[list[Message]], tokenizer: Tokenizer) -> list[list[int]]:
    with _template_errors():
        # return_dict=False: plain lists of ids, which is not the default any more.
        ids: list[list[int]] = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return ids


def _conversation(prompt: Prompt, config: PromptConfig) -> list[Message]:
    """The problem as the user's turn; in a conversation, the template goes around the last turn of the user."""
    turns = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else list(prompt.content)
    asked = max((place for place, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if asked is None:
        raise ValueError(f"prompt '{prompt.id}' is a conversation without a turn of the user; add one with the problem")
    turns[asked] = {"role": "user", "content": _filled(turns[asked]["content"], config)}
    if config.system is None:
        return list(turns)
    return [{"role": "system", "content": config.system}, *(turn for turn in turns if turn["role"] != "system")]


def _text(prompt: Prompt, config: PromptConfig) -> str:
    """The problem as plain text, after the system message and an empty line."""
    if not isinstance(prompt.content, str):
        raise ValueError(
            f"prompt '{prompt.id}' is a conversation, which takes a chat template; "
            "use a tokenizer that has one and leave prompt.chat at 'auto', or give the problem as text"
        )
    text = _filled(prompt.content, config)
    return text if config.system is None else f"{config.system}\n\n{text}"


def _filled(problem: str, config: PromptConfig) -> str:
    # Not str.format: problems and templates are full of braces.
    return config.template.replace(PLACEHOLDER, problem)


_OR_TRUNCATE = " or 'truncate'"


def _fit(prompt: Prompt, ids: list[int], config: PromptConfig) -> tuple[int, ...] | None:
    """The ids within `max_tokens`; None if the prompt is to be dropped."""
    if len(ids) <= config.max_tokens:
        return tuple(ids)
    if config.overlong == "drop":
        return None
    if config.overlong == "truncate" and not prompt.images:  # cut off, an image would have no place
        return tuple(ids[-config.max_tokens :])
    raise ValueError(
        f"prompt '{prompt.id}' has {len(ids)} tokens, prompt.max_tokens is {config.max_tokens}; "
        f"raise it, or set prompt.overlong to 'drop'{_OR_TRUNCATE if not prompt.images else ''}"
    )
