"""From a recipe to modules: the only door for transformers' models and tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging

from remix.config import ModelConfig, Recipe, SeparateCritic
from remix.errors import first_line
from remix.models import files
from remix.models.actor_critic import ActorCritic
from remix.models.adapters import add_adapter, backbone_inputs
from remix.models.compiling import compile_blocks


def load_tokenizer(config: ModelConfig, processor: Any = None) -> Any:
    """The processor's own where there is one. Raises ValueError where there is none, or none that matches."""
    # First, since without the files transformers tries for a minute.
    files.find(config.path, config.revision, files.SMALL_FILES, "model")
    try:
        tokenizer = (
            AutoTokenizer.from_pretrained(
                config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
            if processor is None
            else processor.tokenizer
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_found(config, "tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {config.path}: its tokenizer has no end-of-sequence token; set eos_token there")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(config: ModelConfig, *, needed: bool) -> Any | None:
    """What a vision-language model reads images by; None for a text model, and where it is neither there nor needed.

    Raises ValueError where images are `needed` and the model cannot have them.
    """
    files.find(config.path, config.revision, files.SMALL_FILES, "model")
    if not sees_images(config):
        if needed:
            raise ValueError(
                f"model {config.path}: a text model, and the task has images: choose a vision-language model (of "
                "transformers' AutoModelForImageTextToText), or a task without images"
            )
        return None
    why = "there is none"
    try:
        processor = AutoProcessor.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        if None not in (getattr(processor, name, None) for name in ("image_processor", "tokenizer")):
            # Text and conversations are written by one template, whichever of the two has it.
            template = processor.chat_template or processor.tokenizer.chat_template
            processor.chat_template = processor.tokenizer.chat_template = template
            return processor
        why = f"{type(processor).__name__} has no image processor"
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        why = first_line(error)
    if needed:
        raise ValueError(
            f"model {config.path}: no processor that reads images ({why}): save the model's own beside it "
            "(AutoProcessor, save_pretrained), and install what it needs"
        )
    return None


def sees_images(config: ModelConfig) -> bool:
    """Whether it is loaded as a vision-language model."""
    kind = type(_whole_config(config))
    # Some text models are of a kind that is in both tables.
    both = kind in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(_whole_config(config), "vision_config")
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not both


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Tokens of a model's config that stand for images and the like. No policy writes them: what would be there?"""
    named = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
    return tuple(token for token in range(config.get_text_config().vocab_size) if token in named)


def never_written(config: ModelConfig) -> tuple[int, ...]:
    """The same of a model, without loading weights."""
    return placeholder_ids(_whole_config(config))


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
    lm = load_lm(config, tokenizer, dtype=compute if frozen_base else torch.float32)
    hidden_size, never = lm.config.get_text_config().hidden_size, placeholder_ids(lm.config)
    assert config.gradient_checkpointing != "auto", "decided before a model is loaded"
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
            revision = recipe.critic.revision
            same = path == config.path and revision in (None, config.revision)
            source = config if same else ModelConfig(path=path, revision=revision, dtype=config.dtype)
            critic = _load(AutoModel, source, dtype=torch.float32)
            if config.gradient_checkpointing:
                critic.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            value_head = value_head if path == config.path else _zero_head(critic.config.get_text_config().hidden_size)
    module = ActorCritic(
        lm,
        value_head=value_head,
        critic=critic,
        detach_value=recipe.critic is not None and getattr(recipe.critic, "detach", False),
        logits_chunk=config.logits_chunk,
        autocast=None if compute == torch.float32 else compute,
        never=never,
    ).to(device)
    _check_logprobs(module, config)
    if config.compile:
        for backbone in module.backbones:
            compile_blocks(backbone)
    return module


@torch.no_grad()
def _check_logprobs(module: ActorCritic, config: ModelConfig) -> None:
    """The log-probs that are trained on must be those of the model's own logits, which some families scale."""
    module.eval()
    device = next(module.lm.parameters()).device
    tokens = [token for token in range(module.lm.config.get_text_config().vocab_size) if token not in module.never]
    ids_BS = torch.tensor((tokens * 8)[:8], device=device)[None]
    ours = module(ids_BS, torch.ones_like(ids_BS[:, 1:], dtype=torch.bool), 1.0, with_values=False).logprobs
    with module.autocast(device):
        lm = module.lm.get_base_model() if hasattr(module.lm, "get_base_model") else module.lm
        inputs, ahead = backbone_inputs(module.lm, ids_BS)
        logits = lm(**inputs, use_cache=False).logits[:, ahead:-1].float()
        logits[..., list(module.never)] = -torch.inf
    theirs = logits.log_softmax(-1).gather(-1, ids_BS[:, 1:, None]).squeeze(-1)
    worst = (ours - theirs).abs().max().item()
    if worst > (1e-3 if config.dtype == "float32" else 0.1):
        raise ValueError(
            f"model.path {config.path}: models of type {module.lm.config.model_type} make their logits in a way that "
            f"is not supported (log-probs differ by {worst:.2g}); choose a model of another family"
        )


def load_lm(config: ModelConfig, tokenizer: Any, dtype: torch.dtype) -> Any:
    """The language model by itself, in main memory. Raises ValueError."""
    lm = _load(AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM, config, dtype)
    _check_vocabulary(lm, tokenizer, config)
    eos = lm.generation_config.eos_token_id if lm.generation_config else None
    # Its own sampling settings (temperature, penalties) would quietly make the sampler another policy.
    lm.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id if eos is None else eos, pad_token_id=tokenizer.pad_token_id
    )
    return lm


def eos_token_ids(config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a response, as `load_lm` would have them, without loading weights."""
    try:
        eos = GenerationConfig.from_pretrained(config.path, revision=config.revision).eos_token_id
    except OSError:  # a checkpoint may come without one; its settings are then those of the model's config
        eos = _config(config).eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)


def context_length(config: ModelConfig) -> int | None:
    """Most tokens of a prompt and its response together; None where the architecture knows no limit."""
    model = _config(config)
    trained: int | None = getattr(model, "max_position_embeddings", None)
    rope = getattr(model, "rope_parameters", None) or {}
    if trained is None or rope.get("rope_type") not in ("yarn", "linear", "dynamic"):
        return trained
    return max(trained, int(rope.get("original_max_position_embeddings", trained) * rope.get("factor", 1.0)))


def _zero_head(hidden_size: int) -> nn.Linear:
    head = nn.Linear(hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _load(auto: Any, config: ModelConfig, dtype: torch.dtype) -> Any:
    # First, since transformers opens whatever an index names.
    files.check_weights(files.find(config.path, config.revision, files.MODEL_FILES, "model"))
    try:
        return auto.from_pretrained(
            config.path,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(_not_found(config, "weights", error)) from error


def _config(config: ModelConfig) -> Any:
    """Of the language model alone."""
    return _whole_config(config).get_text_config()


def _whole_config(config: ModelConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_found(config, "config.json", error)) from error


def _not_found(config: ModelConfig, what: str, error: Exception) -> str:
    if not config.trust_remote_code and "trust_remote_code" in str(error):
        return (
            f"model {config.path}: it comes with Python code of its own, which is not run. Choose a model that "
            "transformers knows, or, where you have read and trust that code, train with model.trust_remote_code: true"
        )
    return (
        f"model {config.path}: no usable {what} there ({first_line(error)}). It must be a hub id, or a directory with "
        "config.json, safetensors weights and a tokenizer, as save_pretrained writes them"
    )


def _check_vocabulary(lm: Any, tokenizer: Any, config: ModelConfig) -> None:
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"model {config.path}: the tokenizer knows {len(tokenizer)} tokens, the model {rows}: "
            "they do not belong together"
        )
