"""How many bytes a run needs before its first step, counted from the model's config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
from remix.training.model_shape import ModelShape, find_shape, is_target, uncounted

FLOAT32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ADAMW_MOMENTS = 2
LOGITS_COPIES = 2
"""Logits of a chunk and their exponentials."""
LOGITS_NUMBERS = 2**28
"""[C, V] of a chunk on a GPU, where the recipe leaves C to it."""


Part = Literal["weights", "gradients", "moments", "own"]
"""Of the model in training, or nothing that processes could share out."""


@dataclass(frozen=True, slots=True)
class MemoryItem:
    name: str
    bytes: int
    host: bool = False
    """Kept in the host's memory, whatever the device."""
    part: Part = "own"
    anchor: bool = False
    """Another policy's weights, not the model's own."""


class Totals:
    """Of what a process holds."""

    __slots__ = ()
    items: tuple[MemoryItem, ...]

    @property
    def device_bytes(self) -> int:
        return sum(item.bytes for item in self.items if not item.host)

    @property
    def host_bytes(self) -> int:
        return sum(item.bytes for item in self.items if item.host)


@dataclass(frozen=True, slots=True)
class Memory(Totals):
    """What one process holds, nothing sharded. Activations are not counted."""

    parameters: int | None = None
    trained: int | None = None
    """Trained parameters, the critic's included."""
    share: float | None = None
    """Of the policy's parameters, the adapter's among them, the trained ones; the critic is left out."""
    items: tuple[MemoryItem, ...] = ()
    unknown: str | None = None
    """Why nothing could be counted, and the remedy."""


def estimate_memory(recipe: Recipe) -> Memory:
    shape = find_shape(recipe.model)
    if shape is None:
        return Memory(unknown=uncounted(recipe.model))
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
    critic = critic_parameters(recipe, shape)
    items = tuple(item for item in _items(recipe, shape, trained, critic) if item.bytes)
    return Memory(parameters=shape.parameters, trained=trained + critic, share=trained / policy, items=items)


def _items(recipe: Recipe, shape: ModelShape, trained: int, critic: int) -> Iterator[MemoryItem]:
    model_bytes = shape.parameters * DTYPE_BYTES[recipe.model.dtype]
    if recipe.adapter.type != "none":
        yield MemoryItem(f"frozen weights, {recipe.model.dtype}", model_bytes, part="weights")
    yield MemoryItem("trained weights, float32", trained * FLOAT32, part="weights")
    yield MemoryItem("critic, float32", critic * FLOAT32, part="weights")
    yield MemoryItem("gradients", (trained + critic) * FLOAT32, part="gradients")
    yield MemoryItem("AdamW moments", (trained + critic) * FLOAT32 * ADAMW_MOMENTS, part="moments")
    chunk = recipe.model.logits_chunk or LOGITS_NUMBERS // shape.vocab_size
    chunk = min(chunk, recipe.batch.tokens_per_microbatch)
    yield MemoryItem("logits of a chunk", chunk * shape.vocab_size * FLOAT32 * LOGITS_COPIES)
    if isinstance(recipe.rollout.engine, VLLMEngineConfig):
        yield MemoryItem(f"vLLM weights, {recipe.model.dtype}", model_bytes)
        yield MemoryItem("vLLM weights while it sleeps", model_bytes * recipe.rollout.engine.sleep, host=True)
        if recipe.rollout.engine.lora == "hot_swap":
            yield MemoryItem(f"vLLM LoRA, {recipe.model.dtype}", trained * DTYPE_BYTES[recipe.model.dtype])
        yield MemoryItem("vLLM cache", int(recipe.rollout.engine.kv_cache_gib * 2**30))
    anchored = recipe.kl.weight > 0
    snapshot = trained * FLOAT32
    scored = anchored or recipe.rollout.overlap
    yield MemoryItem("anchor while it scores", snapshot * scored, part="weights", anchor=True)
    yield MemoryItem("reference snapshot", snapshot * anchored, host=True, part="weights", anchor=True)
    # Two: one in use while the next is being taken.
    both = snapshot * 2 * recipe.keeps_precedent
    yield MemoryItem("precedent snapshots", both, host=True, part="weights", anchor=True)
    if recipe.rollout.overlap and isinstance(recipe.rollout.engine, VLLMEngineConfig):
        yield MemoryItem("weights as vLLM was handed them", handed_bytes(recipe, shape, trained), host=True)


def handed_bytes(recipe: Recipe, shape: ModelShape, trained: int) -> int:
    """To an engine at a sync: a LoRA by itself, 4·T; all weights, 4·N where they are trained, else N in the model's
    dtype, the adapter merged into them."""
    if getattr(recipe.rollout.engine, "lora", "merged") == "hot_swap":
        return FLOAT32 * trained
    return shape.parameters * (FLOAT32 if recipe.adapter.type == "none" else DTYPE_BYTES[recipe.model.dtype])


def critic_parameters(recipe: Recipe, shape: ModelShape) -> int:
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
