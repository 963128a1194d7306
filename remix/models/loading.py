"""From a recipe to modules: the only door for transformers' models and PEFT's adapters, in and out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from remix.config import LoraAdapter, ModelConfig, NoAdapter, Recipe, SeparateCritic
from remix.models.actor_critic import ActorCritic

ADAPTER = "policy_adapter"
"""PEFT matches adapter names against parts of parameter paths when it saves, so the name must be unmistakable."""


def load_tokenizer(config: ModelConfig) -> Any:
    """Raises ValueError where there is none, or none that matches."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_found(config, "tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path {config.path}: its tokenizer has no end-of-sequence token; set eos_token there")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def quiet() -> None:
    """No bars and warnings of transformers' own across a run's display."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_actor_critic(recipe: Recipe, tokenizer: Any, device: torch.device) -> ActorCritic:
    """The module in training on its device: language model, adapter, critic. Raises ValueError."""
    config = recipe.model
    compute = getattr(torch, config.dtype)
    # Weights that are trained stay in float32: bfloat16 swallows updates of 1e-6.
    frozen_base = recipe.adapter.type != "none"
    lm = _load(AutoModelForCausalLM, config, dtype=compute if frozen_base else torch.float32)
    _check_vocabulary(lm, tokenizer, config)
    eos = lm.generation_config.eos_token_id if lm.generation_config else None
    # Its own sampling settings (temperature, penalties) would quietly make the sampler another policy.
    lm.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id if eos is None else eos, pad_token_id=tokenizer.pad_token_id
    )
    hidden_size = lm.config.get_text_config().hidden_size
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if frozen_base:
            lm.enable_input_require_grads()
    lm = add_adapter(lm, recipe.adapter)

    value_head, critic = None, None
    if recipe.critic is not None:
        # Zero at first: the first advantages are then the rewards themselves.
        value_head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(value_head.weight)
        nn.init.zeros_(value_head.bias)
        if isinstance(recipe.critic, SeparateCritic):
            path = recipe.critic.path or config.path
            source = config if path == config.path else ModelConfig(path=path, dtype=config.dtype)
            critic = _load(AutoModel, source, dtype=torch.float32)
            value_head = value_head if path == config.path else _zero_head(critic.config.hidden_size)
    return ActorCritic(
        lm,
        value_head=value_head,
        critic=critic,
        detach_value=recipe.critic is not None and getattr(recipe.critic, "detach", False),
        logits_chunk=config.logits_chunk,
        autocast=None if compute == torch.float32 else compute,
    ).to(device)


def add_adapter(lm: Any, config: NoAdapter | LoraAdapter) -> Any:
    """The model with a fresh adapter on it, as PEFT builds it; without one, the model as it is."""
    if isinstance(config, NoAdapter):
        return lm
    from peft import LoraConfig, get_peft_model

    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(lm, lora, adapter_name=ADAPTER)
    except ValueError as error:
        raise ValueError(f"adapter.targets {config.targets}: {error}") from error
    embeddings = {lm.get_input_embeddings(), lm.get_output_embeddings()}
    if embeddings & set(_adapter_layers(adapted)):
        # Log-probs are computed from the head's own weight, which the embedding may share.
        raise ValueError(f"adapter.targets {config.targets}: leave out the embedding and the output head")
    return adapted


def merge_adapter(lm: Any) -> None:
    """Folds the LoRA into the base weights and makes it a fresh one, B = 0. The policy stays the same policy."""
    lm.merge_adapter(adapter_names=[ADAPTER])
    for layer in _adapter_layers(lm):
        layer.merged_adapters.clear()
        layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)


def checkpoint_weights(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """The policy's weights under the names of its base model's checkpoint, the adapter merged in.

    Lazily, one layer at a time; the model in training is left as it was, bit for bit.
    """
    if not hasattr(lm, "get_base_model"):
        yield from ((name, tensor.detach()) for name, tensor in lm.state_dict().items())
        return
    adapted = set(_adapter_layers(lm))
    merged = {f"{name}.base_layer.weight": layer for name, layer in lm.named_modules() if layer in adapted}
    for name, tensor in lm.state_dict().items():
        if f".{ADAPTER}." in f"{name}." or ".lora_" in name:
            continue
        public = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        yield public, _merged_weight(merged[name]) if name in merged else tensor.detach()


def save_model(lm: Any, tokenizer: Any, folder: Path, *, base_changed: bool) -> None:
    """A standard checkpoint, or a standard PEFT adapter where the base weights are still the base model's own."""
    if hasattr(lm, "get_base_model") and base_changed:
        lm.get_base_model().save_pretrained(folder, state_dict=dict(checkpoint_weights(lm)))
    elif hasattr(lm, "get_base_model"):
        # Under its default name, where PEFT puts it into the folder itself and every reader looks for it.
        lm.save_pretrained(folder, selected_adapters=[ADAPTER])
        _lift_adapter(folder)
    else:
        lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _lift_adapter(folder: Path) -> None:
    nested = folder / ADAPTER
    for file in nested.iterdir():
        file.replace(folder / file.name)
    nested.rmdir()


def _merged_weight(layer: Any) -> Tensor:
    base = layer.get_base_layer().weight
    before = base.detach().clone()
    layer.merge(adapter_names=[ADAPTER])
    merged: Tensor = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    # Subtracting the delta again would leave rounding behind.
    base.data.copy_(before)
    return merged


def _adapter_layers(lm: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]


def _zero_head(hidden_size: int) -> nn.Linear:
    head = nn.Linear(hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _load(auto: Any, config: ModelConfig, dtype: torch.dtype) -> Any:
    try:
        return auto.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(config, "weights", error)) from error


def _not_found(config: ModelConfig, what: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"model.path {config.path}: no usable {what} there ({first_line}). It must be a hub id, or a directory with "
        "config.json, safetensors weights and a tokenizer, as save_pretrained writes them"
    )


def _check_vocabulary(lm: Any, tokenizer: Any, config: ModelConfig) -> None:
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"model.path {config.path}: the tokenizer knows {len(tokenizer)} tokens, the model {rows}: "
            "they do not belong together"
        )
