"""What a saved PEFT adapter says of itself, read before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remix.config import AdapterConfig, IA3Adapter, LayersAdapter, LoraAdapter, PrefixAdapter, PromptAdapter
from remix.models import files

VIRTUAL = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
"""PEFT's types that lie before the tokens, not in the weights, and what a recipe calls them."""


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """Its adapter_config.json. Raises ValueError, which begins with `what`, where folder, file or weights are amiss."""
    path = folder / files.ADAPTER_CONFIG
    if not path.exists():
        raise ValueError(f"{what}: no {files.ADAPTER_CONFIG} there, as PEFT saves it")
    try:
        files.check_adapter(folder)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    try:
        config = json.loads(path.read_text("utf-8"))
        config["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{what}: {files.ADAPTER_CONFIG} is not readable: {error}") from None
    if config.get("tokenizer_name_or_path"):
        raise ValueError(
            f"{what}: it names a tokenizer to load, {config['tokenizer_name_or_path']}, as an initial text had it: set "
            f"prompt_tuning_init to RANDOM in its {files.ADAPTER_CONFIG} and all about a tokenizer there to null; its "
            "weights do not depend on it"
        )
    return dict(config)


def kind_of(config: dict[str, Any]) -> str:
    """PEFT's name of the adapter's type."""
    return str(config["peft_type"])


def virtual_tokens(config: dict[str, Any]) -> int:
    """Tokens that the adapter puts before a prompt."""
    return int(config["num_virtual_tokens"]) if kind_of(config) in VIRTUAL else 0


def check_base(config: dict[str, Any], what: str, key: str, model: str, folder: Path) -> None:
    """Shapes alone do not tell a base from its instruct version; the adapter says what it was trained on.

    what: the adapter, for messages; key: what names the base, an option or a recipe's key; folder: where `model` lies.
    Raises ValueError.
    """
    recorded = config.get("base_model_name_or_path")
    if not recorded or _same_model(str(recorded), model, folder):
        return
    raise ValueError(
        f"{what} was trained on another base, {recorded}, not on {model}: give {key} {recorded}; "
        f"if both are the same weights, correct base_model_name_or_path in its {files.ADAPTER_CONFIG}"
    )


def check_start(adapter: AdapterConfig, model: str) -> None:
    """Raises ValueError where a recipe's adapter cannot begin from what `adapter.path` names."""
    if adapter.type == "none" or adapter.path is None:
        return
    folder, what = Path(adapter.path), f"adapter.path {adapter.path}"
    if not folder.is_dir():
        raise ValueError(f"{what}: no such directory; name the folder of a saved adapter")
    saved = read_config(folder, what)
    check_base(saved, what, "model.path", model, Path(model))
    for field, wanted, key in _wanted(adapter):
        found = saved.get(field, wanted)
        if _plain(found) != _plain(wanted):
            raise ValueError(
                f"{what}: its {field} is {found!r}, but the recipe asks for {wanted!r} ({key}): set the recipe's to "
                "the adapter's, or begin with a fresh adapter"
            )


def _wanted(adapter: AdapterConfig) -> Iterator[tuple[str, Any, str]]:
    """Fields of a saved configuration that decide what its weights mean: name, value, the recipe's key."""
    match adapter:
        case LoraAdapter():
            yield "peft_type", "LORA", "adapter.type lora"
            yield "r", adapter.rank, "adapter.rank"
            yield "lora_alpha", adapter.alpha, "adapter.alpha"
            yield "use_rslora", adapter.rslora, "adapter.rslora"
            yield "use_dora", adapter.dora, "adapter.dora"
            yield "bias", "none", "adapter.type lora"
            for field in ("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication"):
                yield field, None, "adapter.type lora"
        case IA3Adapter():
            yield "peft_type", "IA3", "adapter.type ia3"
            yield "feedforward_modules", list(adapter.feedforward), "adapter.feedforward"
            yield "modules_to_save", None, "adapter.type ia3"
        case PrefixAdapter():
            yield "peft_type", "PREFIX_TUNING", "adapter.type prefix"
            yield "num_virtual_tokens", adapter.tokens, "adapter.tokens"
            yield "prefix_projection", False, "adapter.type prefix"
        case PromptAdapter():
            yield "peft_type", "PROMPT_TUNING", "adapter.type prompt"
            yield "num_virtual_tokens", adapter.tokens, "adapter.tokens"
        case LayersAdapter():
            yield "peft_type", "LN_TUNING", "adapter.type layers"
            yield "modules_to_save", None, "adapter.type layers"


def _plain(value: Any) -> Any:
    """PEFT writes sets as lists in any order, and an empty pattern as {} or null."""
    return (sorted(value) if isinstance(value, list) else value) or None


def _same_model(recorded: str, model: str, folder: Path) -> bool:
    """By name, by place, by the last part of the name (a local copy of a hub model), or by the weights themselves."""
    if recorded == model or Path(recorded).name.lower() in (Path(model).name.lower(), folder.name.lower()):
        return not Path(recorded).is_dir() or _same_weights(Path(recorded), folder)
    in_hub_cache = f"models--{recorded.replace('/', '--')}" in folder.parts
    return in_hub_cache or (Path(recorded).is_dir() and _same_weights(Path(recorded), folder))


def _same_weights(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    first, second = (files.fingerprint(folder, ["*.safetensors"])["sha256"] for folder in (one, other))
    return bool(first == second)
