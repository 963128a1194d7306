"""What a forward keeps for its backward, and whether blocks are to keep it or compute it again.

Activations are counted from the model's config.json, as all memory is; a test measures what autograd really keeps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from remix.config import PrefixAdapter, Recipe, SeparateCritic, VLLMEngineConfig
from remix.training.backends import Backend
from remix.training.memory import DTYPE_BYTES, FLOAT32, Memory
from remix.training.model_shape import ModelShape, find_shape

if TYPE_CHECKING:
    import torch

STREAM, ATTENTION, MLP = 8, 9, 4
"""Numbers that a block keeps of a token: so often its hidden width, its attention's, its MLP's. In float32 what the
normalisations have to do with, in the forward's dtype the rest; keys counted as many as queries."""
USABLE = 0.9
"""Of a device's memory: the rest is torch's own, and what no two allocations fit into."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes, of the largest micro-batch that the recipe allows."""

    kept: int
    checkpointed: int
    """Under gradient checkpointing: the blocks' inputs, and one block's whole."""


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """What `model.gradient_checkpointing` amounts to."""

    on: bool
    why: str


def estimate_activations(recipe: Recipe, shape: ModelShape) -> Activations:
    """Tokens x blocks x (4·8h + b·(9a + 4m)), of b bytes a number and widths h hidden, a attention, m MLP; where the
    matrices are unknown, a = h and m = 4h. A critic of its own keeps as much again."""
    longest = recipe.prompt.max_tokens + recipe.rollout.max_tokens
    of_minibatch = -(-recipe.batch.prompts * recipe.rollout.group_size // recipe.batch.minibatches) * longest
    tokens = min(recipe.batch.tokens_per_microbatch, of_minibatch)
    hidden, widths = shape.hidden_size, shape.linears or {}
    into = {name.rpartition(".")[2]: width for name, (width, _) in widths.items()}
    attention, mlp = into.get("o_proj", hidden), into.get("down_proj", 4 * hidden)
    width = DTYPE_BYTES[recipe.model.dtype]
    block = tokens * (FLOAT32 * STREAM * hidden + width * (ATTENTION * attention + MLP * mlp))
    blocks = shape.blocks * (1 + isinstance(recipe.critic, SeparateCritic))
    return Activations(block * blocks, tokens * FLOAT32 * hidden * blocks + block)


def device_memory(device: torch.device | None = None) -> tuple[int, str]:
    """Bytes of a process's device, and what it is; without a device, of the first GPU here, or of this machine."""
    import torch

    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        properties = torch.cuda.get_device_properties(device or 0)
        return properties.total_memory, properties.name
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local, "the host's memory"


def choose_checkpointing(
    recipe: Recipe, memory: Memory, device: tuple[int, str], backend: Backend = Backend.DDP, world_size: int = 1
) -> Checkpointing:
    """As the recipe says; under `auto`, on where what is kept does not fit beside what the process holds anyway.

    `device`: as `device_memory` says.
    """
    from remix.training.cluster_plan import NAMES, backend_items

    asked = recipe.model.gradient_checkpointing
    if asked != "auto":
        return Checkpointing(asked, "as the recipe says")
    if isinstance(recipe.adapter, PrefixAdapter):
        return Checkpointing(False, "a prefix sits in the attention cache, which it does without")
    shape = None if memory.unknown else find_shape(recipe.model)
    if shape is None:
        return Checkpointing(True, "the model's size is unknown")
    total, name = device
    engine = recipe.rollout.engine
    on_gpu = name != "the host's memory"
    items = backend_items(NAMES[backend], memory, shape, recipe, world_size)
    # vLLM takes its share of a GPU, whatever it holds; asleep it takes nothing.
    items = [item for item in items if not (on_gpu and item.name.startswith("vLLM"))]
    share = engine.memory_fraction if on_gpu and isinstance(engine, VLLMEngineConfig) and not engine.sleep else 0.0
    held = sum(item.bytes for item in items if not (on_gpu and item.host))
    room = int(USABLE * total * (1 - share)) - held
    kept = estimate_activations(recipe, shape).kept
    fits = kept <= room
    words = (
        f"{kept / 2**30:.2f} GiB of activations {'fit' if fits else 'do not fit'} into the {max(room, 0) / 2**30:.2f}"
    )
    return Checkpointing(not fits, f"{words} GiB that are left of {name} ({total / 2**30:.1f} GiB)")
