"""From a recipe to modules: the only door for transformers' models and PEFT's adapters, in and out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from remix.config import LoraAdapter, ModelConfig, NoAdapter, Recipe, SeparateCritic
from remix.durable import write_json
from remix.models import files
from remix.models.actor_critic import ActorCritic

ADAPTER = "policy_adapter"
"""PEFT matches adapter names against parts of parameter paths when it saves, so the name must be unmistakable."""

MERGEABLE = frozenset(
    {"ADALORA", "BOFT", "C3A", "DELORA", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT"}
    | {"RANDLORA", "ROAD", "SHIRA", "VBLORA", "VERA"}
)
"""PEFT's types whose whole effect is on the weights. Others may name further models and tokenizers to load."""


def load_tokenizer(config: ModelConfig) -> Any:
    """Raises ValueError where there is none, or none that matches."""
    # First, since without the files transformers tries for a minute.
    files.find(config.path, config.revision, files.SMALL_FILES, "model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_found(config, "tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {config.path}: its tokenizer has no end-of-sequence token; set eos_token there")
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
    lm = load_lm(config, tokenizer, dtype=compute if frozen_base else torch.float32)
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
            revision = recipe.critic.revision
            same = path == config.path and revision in (None, config.revision)
            source = config if same else ModelConfig(path=path, revision=revision, dtype=config.dtype)
            critic = _load(AutoModel, source, dtype=torch.float32)
            if config.gradient_checkpointing:
                critic.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            value_head = value_head if path == config.path else _zero_head(critic.config.hidden_size)
    module = ActorCritic(
        lm,
        value_head=value_head,
        critic=critic,
        detach_value=recipe.critic is not None and getattr(recipe.critic, "detach", False),
        logits_chunk=config.logits_chunk,
        autocast=None if compute == torch.float32 else compute,
    ).to(device)
    _check_logprobs(module, config)
    return module


@torch.no_grad()
def _check_logprobs(module: ActorCritic, config: ModelConfig) -> None:
    """The log-probs that are trained on must be those of the model's own logits, which some families scale."""
    module.eval()
    device = next(module.lm.parameters()).device
    ids_BS = torch.arange(8, device=device)[None] % module.lm.config.get_text_config().vocab_size
    ours = module(ids_BS, torch.ones_like(ids_BS[:, 1:], dtype=torch.bool), 1.0, with_values=False).logprobs
    with module.autocast(device):
        logits = module.lm(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
    theirs = logits.log_softmax(-1).gather(-1, ids_BS[:, 1:, None]).squeeze(-1)
    worst = (ours - theirs).abs().max().item()
    if worst > (1e-3 if config.dtype == "float32" else 0.1):
        raise ValueError(
            f"model.path {config.path}: models of type {module.lm.config.model_type} make their logits in a way that "
            f"is not supported (log-probs differ by {worst:.2g}); choose a model of another family"
        )


def load_lm(config: ModelConfig, tokenizer: Any, dtype: torch.dtype) -> Any:
    """The language model by itself, in main memory. Raises ValueError."""
    lm = _load(AutoModelForCausalLM, config, dtype)
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


def merge_saved_adapter(lm: Any, folder: Path) -> Any:
    """The model with a saved PEFT adapter folded into its weights. Raises ValueError where it does not fit."""
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    wrong = f"the adapter {folder} does not fit this model, so it was trained on another"
    files.check_adapter(folder)  # PEFT would go on to look for a pickle
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the adapter {folder}: not a saved PEFT adapter ({_first_line(error)})") from error
    if not weights:
        raise ValueError(f"the adapter {folder}: it holds no weights")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in MERGEABLE:
        raise ValueError(f"the adapter {folder}: a {kind} adapter cannot be merged into the weights")
    config.inference_mode = True
    if getattr(config, "megatron_config", None):
        config.megatron_config = None  # with it PEFT imports whatever module the file names
    try:
        adapted = PeftModel(lm, config, adapter_name=ADAPTER)
        loaded = set_peft_model_state_dict(adapted, weights, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:  # no such layers, or of another shape
        detail = next((line for line in str(error).splitlines() if "size mismatch" in line), _first_line(error))
        raise ValueError(f"{wrong}: {detail.strip()}") from error
    missing = [name for name in loaded.missing_keys if f".{ADAPTER}" in name]
    if loaded.unexpected_keys or missing:
        odd = [*loaded.unexpected_keys, *missing]
        raise ValueError(f"{wrong}: {odd[0]} and {len(odd) - 1} more weights are on one side only")
    return adapted.merge_and_unload()


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


_SETS = ("target_modules", "exclude_modules")


def _lift_adapter(folder: Path) -> None:
    nested = folder / ADAPTER
    for file in nested.iterdir():
        file.replace(folder / file.name)
    nested.rmdir()
    # PEFT writes sets in whatever order they have in this process.
    path = folder / files.ADAPTER_CONFIG
    config = {
        k: sorted(v) if k in _SETS and isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()
    }
    write_json(path, config)


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
    try:
        return AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        ).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_not_found(config, "config.json", error)) from error


def _not_found(config: ModelConfig, what: str, error: Exception) -> str:
    if not config.trust_remote_code and "trust_remote_code" in str(error):
        return (
            f"model {config.path}: it comes with Python code of its own, which is not run. Choose a model that "
            "transformers knows, or, where you have read and trust that code, train with model.trust_remote_code: true"
        )
    return (
        f"model {config.path}: no usable {what} there ({_first_line(error)}). It must be a hub id, or a directory with "
        "config.json, safetensors weights and a tokenizer, as save_pretrained writes them"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _check_vocabulary(lm: Any, tokenizer: Any, config: ModelConfig) -> None:
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"model {config.path}: the tokenizer knows {len(tokenizer)} tokens, the model {rows}: "
            "they do not belong together"
        )
