"""How many bytes a run needs before its first step, counted from the model's config.json alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remix.config import (
    AdapterConfig,
    IA3Adapter,
    LayersAdapter,
    LoraAdapter,
    ModelConfig,
    PrefixAdapter,
    PromptAdapter,
    Recipe,
    SeparateCritic,
    VLLMEngineConfig,
)

FLOAT32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ADAMW_MOMENTS = 2
LOGITS_COPIES = 2
"""Logits of a chunk and their exponentials."""
LOGITS_NUMBERS = 2**28
"""[C, V] of a chunk on a GPU, where the recipe leaves C to it."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Of one transformer block."""

    parameters: int
    norms: int
    """Parameters of its normalisations, which have no biases."""
    biases: int
    cache: int
    """Numbers that one token has in the attention cache: keys and values."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on."""

    parameters: int
    backbone: int
    """Parameters without an output head of their own: what a critic's backbone holds."""
    hidden_size: int
    vocab_size: int
    positions: int | None = None
    """Longest sequence that the model was made for; None = unknown, or stretched by RoPE scaling."""
    linears: Mapping[str, tuple[int, int]] | None = None
    """Input and output width of every matrix that an adapter can be put on, by module name; None = unknown."""
    blocks: int = 0
    block: BlockShape | None = None
    """None = unknown."""

    @property
    def tied(self) -> bool:
        """The output head is the embedding."""
        return self.parameters == self.backbone


@dataclass(frozen=True, slots=True)
class MemoryItem:
    name: str
    bytes: int
    host: bool = False
    """Kept in the host's memory, whatever the device."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one process holds, nothing sharded. Activations are not counted."""

    parameters: int | None = None
    trained: int | None = None
    """Trained parameters, the critic's included."""
    share: float | None = None
    """Of the policy's parameters, the adapter's among them, the trained ones; the critic is left out."""
    items: tuple[MemoryItem, ...] = ()
    unknown: str | None = None
    """Why nothing could be counted, and the remedy."""

    @property
    def device_bytes(self) -> int:
        return sum(item.bytes for item in self.items if not item.host)

    @property
    def host_bytes(self) -> int:
        return sum(item.bytes for item in self.items if item.host)


def estimate_memory(recipe: Recipe) -> Memory:
    shape = find_shape(recipe.model)
    if shape is None:
        return Memory(unknown=f"{recipe.model.path} is not on this machine: set model.size to count memory")
    trained = shape.parameters
    policy = shape.parameters
    if recipe.adapter.type != "none":
        counted = adapter_parameters(shape, recipe.adapter)
        if counted is None:
            return Memory(
                parameters=shape.parameters,
                unknown="an adapter is counted from the model's config.json: download the model, or name its directory",
            )
        trained = counted
        policy += trained
    critic = _critic_parameters(recipe, shape)
    items = tuple(item for item in _items(recipe, shape, trained, critic) if item.bytes)
    return Memory(parameters=shape.parameters, trained=trained + critic, share=trained / policy, items=items)


def _items(recipe: Recipe, shape: ModelShape, trained: int, critic: int) -> Iterator[MemoryItem]:
    model_bytes = shape.parameters * DTYPE_BYTES[recipe.model.dtype]
    if recipe.adapter.type != "none":
        yield MemoryItem(f"frozen weights, {recipe.model.dtype}", model_bytes)
    yield MemoryItem("trained weights, float32", trained * FLOAT32)
    yield MemoryItem("critic, float32", critic * FLOAT32)
    yield MemoryItem("gradients", (trained + critic) * FLOAT32)
    yield MemoryItem("AdamW moments", (trained + critic) * FLOAT32 * ADAMW_MOMENTS)
    chunk = recipe.model.logits_chunk or LOGITS_NUMBERS // shape.vocab_size
    yield MemoryItem("logits of a chunk", chunk * shape.vocab_size * FLOAT32 * LOGITS_COPIES)
    if isinstance(recipe.rollout.engine, VLLMEngineConfig):
        yield MemoryItem(f"vLLM weights, {recipe.model.dtype}", model_bytes)
        if recipe.rollout.engine.lora == "hot_swap":
            yield MemoryItem(f"vLLM LoRA, {recipe.model.dtype}", trained * DTYPE_BYTES[recipe.model.dtype])
        yield MemoryItem("vLLM cache", int(recipe.rollout.engine.kv_cache_gib * 2**30))
    anchored = recipe.kl.weight > 0
    yield MemoryItem("anchor while it scores", trained * FLOAT32 * anchored)
    yield MemoryItem("reference snapshot", trained * FLOAT32 * anchored, host=True)
    # Two: one in use while the next is being taken.
    yield MemoryItem("precedent snapshots", trained * FLOAT32 * 2 * recipe.kl.uses_precedent, host=True)


def _critic_parameters(recipe: Recipe, shape: ModelShape) -> int:
    """All of them are trained."""
    critic = recipe.critic
    if critic is None:
        return 0
    backbone = 0
    if isinstance(critic, SeparateCritic):
        if critic.path:
            shape = find_shape(ModelConfig(path=critic.path)) or shape
        backbone = shape.backbone
    return backbone + shape.hidden_size + 1


def adapter_parameters(shape: ModelShape, adapter: AdapterConfig) -> int | None:
    """What is trained of the policy; None where the model's matrices are unknown."""
    if shape.linears is None or shape.block is None:
        return None
    match adapter:
        case LoraAdapter():
            return lora_parameters(shape, adapter)
        case IA3Adapter():
            return sum(
                widths[0] if is_target(name, adapter.feedforward) else widths[1]
                for name, widths in shape.linears.items()
                if is_target(name, adapter.targets)
            )
        case PrefixAdapter():
            return adapter.tokens * shape.blocks * shape.block.cache
        case PromptAdapter():
            return adapter.tokens * shape.hidden_size
        case LayersAdapter():
            others = shape.blocks - adapter.last_blocks
            norms = others * shape.block.norms + shape.hidden_size
            small = norms * adapter.norms + others * shape.block.biases * adapter.biases
            return (
                adapter.last_blocks * shape.block.parameters
                + small
                + adapter.head * shape.vocab_size * shape.hidden_size
            )
    return shape.parameters


def lora_parameters(shape: ModelShape, adapter: LoraAdapter) -> int | None:
    """A [r, in] and B [out, r] on every target, and DoRA's magnitude [out]; None where the matrices are unknown."""
    if shape.linears is None:
        return None
    return sum(
        adapter.rank * (width_in + width_out) + width_out * adapter.dora
        for name, (width_in, width_out) in shape.linears.items()
        if is_target(name, adapter.targets)
    )


def is_target(module: str, targets: str | tuple[str, ...]) -> bool:
    """PEFT's rule: a string is a pattern of the whole name, a list holds names or their ends."""
    if targets == "all-linear":
        return module.endswith("_proj")  # neither embedding nor output head
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def find_shape(model: ModelConfig) -> ModelShape | None:
    """From the directory's config.json, else from the hub's local cache, else from `model.size`. No network."""
    path = Path(model.path) / "config.json"
    if not os.path.isdir(model.path):  # unlike Path.is_dir, False for what is too long for a path
        cached = _cached_config(model.path, model.revision)
        path = cached or path
    if os.path.isfile(path):
        shape = shape_from_config(json.loads(path.read_text(encoding="utf-8")))
        if shape is not None:
            return shape
    if model.size is None:
        return None
    size = model.size
    return ModelShape(size.parameters, size.parameters, size.hidden_size, size.vocab_size)


def _cached_config(repo: str, revision: str | None) -> Path | None:
    if repo.count("/") > 1 or repo.startswith(("/", ".", "~")):
        return None  # a path, no hub id
    from huggingface_hub import try_to_load_from_cache  # slow to import

    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


def shape_from_config(config: Mapping[str, Any]) -> ModelShape | None:
    """Exact for decoders of the Llama kind, which Qwen's are; None for any other."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        return None
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    mlp = config["intermediate_size"]
    qkv_bias = family == "qwen2" or bool(config.get("attention_bias"))
    output_bias = family != "qwen2" and bool(config.get("attention_bias"))
    mlp_bias = bool(config.get("mlp_bias"))
    matrices = {  # name: (input width, output width, whether it has a bias)
        "self_attn.q_proj": (hidden, attention, qkv_bias),
        "self_attn.k_proj": (hidden, kv, qkv_bias),
        "self_attn.v_proj": (hidden, kv, qkv_bias),
        "self_attn.o_proj": (attention, hidden, output_bias),
        "mlp.gate_proj": (hidden, mlp, mlp_bias),
        "mlp.up_proj": (hidden, mlp, mlp_bias),
        "mlp.down_proj": (mlp, hidden, mlp_bias),
    }
    norms = 2 * hidden + (2 * head_dim if family == "qwen3" else 0)
    biases = sum(columns * bias for _, columns, bias in matrices.values())
    layer = norms + sum(rows * columns for rows, columns, _ in matrices.values()) + biases
    backbone = vocab * hidden + layers * layer + hidden
    linears = {
        f"model.layers.{index}.{name}": (rows, columns)
        for index in range(layers)
        for name, (rows, columns, _) in matrices.items()
    }
    stretched = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    return ModelShape(
        parameters=backbone + (0 if config.get("tie_word_embeddings") else vocab * hidden),
        backbone=backbone,
        hidden_size=hidden,
        vocab_size=vocab,
        positions=config.get("max_position_embeddings") if stretched == "default" else None,
        blocks=layers,
        block=BlockShape(parameters=layer, norms=norms, biases=biases, cache=2 * kv),
        linears={**linears, "model.embed_tokens": (vocab, hidden), "lm_head": (hidden, vocab)},
    )
