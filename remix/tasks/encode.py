"""From a problem to the token ids that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from jinja2 import TemplateError

from remix.config import PromptConfig
from remix.types import Message, Prompt

PLACEHOLDER = "{problem}"


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any

    def __call__(self, text: list[str], /) -> Any: ...

    def apply_chat_template(self, conversation: list[list[Message]], /, **options: Any) -> Any: ...


def encode(prompts: Sequence[Prompt], tokenizer: Tokenizer, config: PromptConfig) -> list[Prompt]:
    """The prompts with their `token_ids`, in order; fewer than were given only under `overlong: drop`."""
    if PLACEHOLDER not in config.template:
        raise ValueError(f"prompt.template does not contain {PLACEHOLDER}, so every prompt would be the same; add it")
    if not prompts:
        return []
    if _uses_chat(tokenizer, config):
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


def _encode_chats(conversations: list[list[Message]], tokenizer: Tokenizer) -> list[list[int]]:
    try:
        # return_dict=False: plain lists of ids, which is not the default any more.
        ids: list[list[int]] = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses a prompt: {error}; "
            "where it knows no system role, put prompt.system into prompt.template"
        ) from error
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


def _fit(prompt: Prompt, ids: list[int], config: PromptConfig) -> tuple[int, ...] | None:
    """The ids within `max_tokens`; None if the prompt is to be dropped."""
    if len(ids) <= config.max_tokens:
        return tuple(ids)
    if config.overlong == "drop":
        return None
    if config.overlong == "truncate":
        return tuple(ids[-config.max_tokens :])
    raise ValueError(
        f"prompt '{prompt.id}' has {len(ids)} tokens, prompt.max_tokens is {config.max_tokens}; "
        "raise it, or set prompt.overlong to 'drop' or 'truncate'"
    )
