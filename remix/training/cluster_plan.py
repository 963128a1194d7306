"""What a recipe asks of a cluster: memory of a GPU by backend, what processes exchange, how fast samplers must be.

Arithmetic alone; each function is one formula. Lengths are the longest that the recipe allows, so bytes and tokens are
upper bounds. Letters: W processes, one to each GPU that trains; T trained and F frozen parameters; P tokens of a prompt
and R of a response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from remix.config import GAEAdvantage, HFEngineConfig, MixPolicyPhase, Recipe, SeparateCritic, nearest
from remix.training.backends import Backend as Launch
from remix.training.memory import (
    DTYPE_BYTES,
    FLOAT32,
    Memory,
    MemoryItem,
    Part,
    Totals,
    critic_parameters,
    handed_bytes,
)
from remix.training.model_shape import ModelShape, find_shape
from remix.training.plan import PhasePlan, Plan

Backend = Literal["none", "zero2", "zero3", "fsdp2"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
SHARED: Mapping[Backend, frozenset[Part]] = {
    "none": frozenset(),
    "zero2": frozenset({"gradients", "moments"}),
    "zero3": frozenset({"weights", "gradients", "moments"}),
    "fsdp2": frozenset({"weights", "gradients", "moments"}),
}
"""What processes hold each a W-th of."""
NAMES: Mapping[Launch, Backend] = {
    Launch.DDP: "none",
    Launch.ZERO2: "zero2",
    Launch.ZERO3: "zero3",
    Launch.FSDP2: "fsdp2",
}
"""Of the backends that a run is launched under."""
ZERO_BUCKET = 500_000_000
"""Gradients that DeepSpeed gathers before it sends them: its buffer is allocated whole (reduce_bucket_size)."""
SENT, HELD = 20, 310
"""Bytes around a tensor's values, when it is sent and when it is in memory."""
TEXT_BYTES, ID_BYTES, OBJECT_BYTES = 4, 5, 80
"""Of objects: a token's text, a prompt's token id, the rest of a rollout."""


@dataclass(frozen=True, slots=True)
class Machines:
    nodes: int
    gpus: int
    """Of each node; one process trains on each."""
    samplers: int = 0
    """GPUs beside them that sample alone; 0 = those that train sample too, in turn."""
    tflops: float = 200.0
    """What one GPU achieves in forward and backward passes, in 10¹² operations a second."""
    seconds: float | None = None
    """That a training step is to take."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True, slots=True)
class BackendPlan(Totals):
    items: tuple[MemoryItem, ...]
    """What one process holds."""
    exchange: int
    """Bytes of weights and gradients that a process sends in one optimiser step, and receives."""


@dataclass(frozen=True, slots=True)
class PhaseTraffic:
    """Of one training step."""

    type: str
    rollouts: int
    """Bytes of fresh rollouts that a process receives from the others."""
    scores: int
    """Bytes of log-probs and values that it receives."""
    replay: int
    """Bytes of the replay window in a process's host memory."""
    tokens: int
    """Fresh response tokens, refill left out."""
    trainer_seconds: float | None
    """Scoring and updates; None = the model's size is unknown."""
    rate: float | None
    """Tokens a second from all samplers together, for sampling to take as long as the trainer's part."""
    rate_for_step: float | None
    """The same for a step of the seconds asked for; None = none asked for, or the trainer's part alone takes longer."""


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    machines: Machines
    backends: Mapping[str, BackendPlan]
    """Empty where the model's size is unknown."""
    sync: int | None
    """Bytes of weights that one engine is handed after each step; None = the model's size is unknown."""
    phases: tuple[PhaseTraffic, ...]


def read_machines(text: str) -> Machines:
    """From `nodes=4,gpus=8`. Raises ValueError."""
    known = [field.name for field in fields(Machines)]
    found: dict[str, float] = {}
    for word in text.split(","):
        key, equals, value = (part.strip() for part in word.partition("="))
        if key not in known:
            raise ValueError(f"--cluster {word}: no such key; {nearest(key, known)}; for example nodes=4,gpus=8")
        whole = key in ("nodes", "gpus", "samplers")
        if not equals or not re.fullmatch(r"\d{1,7}" if whole else r"\d{1,9}(\.\d+)?", value):
            raise ValueError(f"--cluster {word}: expected {key}=a {'whole ' * whole}number, for example {key}=8")
        if key in found:
            raise ValueError(f"--cluster: {key} is there twice; give it once")
        found[key] = int(value) if whole else float(value)
        if not found[key] and key != "samplers":
            raise ValueError(f"--cluster {word}: {key} must be above 0")
    for key in ("nodes", "gpus"):
        if key not in found:
            raise ValueError(f"--cluster {text}: {key} is missing; for example nodes=4,gpus=8")
    return Machines(**found)  # type: ignore[arg-type]


def plan_cluster(recipe: Recipe, plan: Plan, machines: Machines) -> ClusterPlan:
    """`plan`: of the same recipe on as many processes."""
    shape, world = None if plan.memory.unknown else find_shape(recipe.model), machines.world_size
    backends: dict[str, BackendPlan] = {}
    most = max(microbatches(recipe, phase) for phase in plan.phases)
    if shape is not None:
        for backend in BACKENDS:
            items = tuple(backend_items(backend, plan.memory, shape, recipe, world))
            backends[backend] = BackendPlan(items, exchange_bytes(backend, plan.memory, most, world))
    phases = tuple(_traffic(recipe, index, phase, shape, machines) for index, phase in enumerate(plan.phases))
    return ClusterPlan(machines, backends, None if shape is None else sync_bytes(recipe, plan.memory, shape), phases)


# --- memory of a process ------------------------------------------------------------------------------------------


def backend_items(backend: Backend, memory: Memory, shape: ModelShape, recipe: Recipe, world: int) -> list[MemoryItem]:
    """Each item of the plan whole, or 1/W of it where the backend shares it out, and what the backend adds:

    none    DDP's buckets: the gradients once more
    zero2   its own float32 copy of the trained weights that it updates, 4·T/W; its bucket
    zero3   its bucket; what is gathered, as for fsdp2
    fsdp2   outside of the blocks and two blocks, whole: in use, and on their way; of trained ones the gradients too

    Under zero3 and fsdp2, where the trainer's own module samples, also the whole weights meanwhile.
    """
    items = [
        MemoryItem(item.name, -(-item.bytes // world) if item.part in SHARED[backend] else item.bytes, item.host)
        for item in memory.items
    ]
    trained = FLOAT32 * (memory.trained or 0)
    if world > 1 and backend == "none":
        items.append(MemoryItem("DDP's buckets", trained))
    if backend == "zero2":
        items.append(MemoryItem("DeepSpeed's copy of its weights", -(-trained // world)))
    if backend in ("zero2", "zero3"):
        items.append(MemoryItem("DeepSpeed's bucket", ZERO_BUCKET * FLOAT32))
    if backend in ("zero3", "fsdp2"):
        full = recipe.adapter.type == "none"
        width = FLOAT32 if full else DTYPE_BYTES[recipe.model.dtype]
        live = gathered_parameters(shape) * (width + FLOAT32 * full)
        items.append(MemoryItem("gathered blocks", live))
        if isinstance(recipe.rollout.engine, HFEngineConfig):
            items.append(MemoryItem("whole weights while it samples", shape.parameters * width))
    return items


def gathered_parameters(shape: ModelShape) -> int:
    """N - L·B + 2·B, of N parameters in L blocks of B: embedding, head and the like, and two blocks; all where the
    blocks are unknown."""
    if not shape.blocks:
        return shape.parameters
    if shape.block is not None:
        block = shape.block.parameters
    else:
        block = max(shape.parameters - 2 * shape.vocab_size * shape.hidden_size, 0) // shape.blocks
    return shape.parameters - (shape.blocks - min(2, shape.blocks)) * block


# --- what goes over the network -----------------------------------------------------------------------------------


def microbatches(recipe: Recipe, phase: PhasePlan) -> int:
    """Of a process in one optimiser step, at most: ⌈n / ⌊budget / (P + R)⌋⌉ of its n rollouts."""
    longest = recipe.prompt.max_tokens + recipe.rollout.max_tokens
    return -(-phase.rollouts_per_process // max(1, recipe.batch.tokens_per_microbatch // longest))


def exchange_bytes(backend: Backend, memory: Memory, count: int, world: int) -> int:
    """Sent by a process in one optimiser step of `count` micro-batches, by ring collectives, f = (W - 1)/W:

    none          f·2·4T                all-reduce of the gradients, once
    zero2         f·(count + 1)·4T      reduce-scatter of them for each micro-batch; all-gather of the new weights
    zero3, fsdp2  f·count·(2·S + 4T)    all-gather of the S bytes of weights before forward and before backward, and
                                        reduce-scatter of the gradients, for each micro-batch
    """
    gradients = FLOAT32 * (memory.trained or 0)
    stored = sum(item.bytes for item in memory.items if item.part == "weights" and not item.anchor)
    sent = {
        "none": 2 * gradients,
        "zero2": (count + 1) * gradients,
        "zero3": count * (2 * stored + gradients),
        "fsdp2": count * (2 * stored + gradients),
    }[backend]
    return sent * (world - 1) // world


def sync_bytes(recipe: Recipe, memory: Memory, shape: ModelShape) -> int:
    """Handed to one engine: 0 to the trainer's own module; see `handed_bytes`."""
    if isinstance(recipe.rollout.engine, HFEngineConfig):
        return 0
    return handed_bytes(recipe, shape, (memory.trained or 0) - critic_parameters(recipe, shape))


def gather_bytes(items: int, each: int, world: int) -> int:
    """Received by a process where all get what each made of its share: (W - 1)·⌈items/W⌉·each.

    Every process's are padded to the longest.
    """
    return (world - 1) * -(-items // world) * each


def group_bytes(prompt: int, response: int, group_size: int, floats: int = 1, around: int = SENT) -> int:
    """A group, as it comes from the samplers: (8 + 5 + 4)·P for the prompt's tokens, twice, and its text; for each of G
    rollouts 8·R of token ids, 4·R of text, 4·R of each of its log-probs; and what is around tensors."""
    rollout = (8 + TEXT_BYTES + 4 * floats) * response + (1 + floats) * around + OBJECT_BYTES
    return (8 + ID_BYTES + TEXT_BYTES) * prompt + around + group_size * rollout


def score_bytes(response: int, *, with_values: bool) -> int:
    """What a policy says of a response: 4·R of log-probs, as many of values."""
    return (1 + with_values) * (4 * response + SENT)


# --- time ---------------------------------------------------------------------------------------------------------


def step_operations(recipe: Recipe, phase: PhasePlan, shape: ModelShape) -> float:
    """Floating-point operations of scoring and updates: 2·M a token forward and 4·M backward, of M parameters in
    matrices; with frozen weights backward is 2·M, with gradient checkpointing there is one more forward, and under
    auto may be.

    Attention's own products and the sampling are left out.
    """
    matrices = shape.parameters - (0 if shape.tied else shape.vocab_size * shape.hidden_size)
    again = 2 * (recipe.model.gradient_checkpointing is not False)
    update = 2 + (4 if recipe.adapter.type == "none" else 2) + again
    longest = recipe.prompt.max_tokens + recipe.rollout.max_tokens
    trained, anchors = phase.tokens * phase.utd_ratio, phase.anchor_forwards
    scored = (anchors.proximal * (not recipe.imitates) + anchors.reference + anchors.precedent) * longest
    critic = 0
    if isinstance(recipe.critic, SeparateCritic):
        backbone = critic_parameters(recipe, shape)
        critic = backbone * ((6 + again) * trained + 2 * anchors.critic * longest)
    return float(matrices * (update * trained + 2 * scored) + critic)


def _traffic(
    recipe: Recipe, index: int, phase: PhasePlan, shape: ModelShape | None, machines: Machines
) -> PhaseTraffic:
    prompt, response, world = recipe.prompt.max_tokens, recipe.rollout.max_tokens, machines.world_size
    values, anchors = isinstance(recipe.advantage, GAEAdvantage), phase.anchor_forwards
    scores = gather_bytes(phase.rollouts, score_bytes(response, with_values=values), world) * (not recipe.imitates)
    if recipe.kl.estimator != "full":  # it is taken amid the updates, and nothing of it is kept
        for count in (anchors.reference, anchors.precedent):
            scores += gather_bytes(count, score_bytes(response, with_values=False), world)
    config = recipe.phases[index]
    stored = group_bytes(prompt, response, phase.group_size, floats=4, around=HELD)
    tokens = phase.fresh_rollouts * response
    seconds = rate = for_step = None
    if shape is not None:
        seconds = step_operations(recipe, phase, shape) / (machines.tflops * 1e12 * world)
        rate = tokens / seconds
        if machines.seconds is not None and machines.seconds > seconds:
            for_step = tokens / (machines.seconds - seconds * (not recipe.rollout.overlap))
    return PhaseTraffic(
        type=phase.type,
        rollouts=gather_bytes(phase.fresh_prompts, group_bytes(prompt, response, phase.group_size), world),
        scores=scores,
        replay=stored * phase.fresh_prompts * config.window if isinstance(config, MixPolicyPhase) else 0,
        tokens=tokens,
        trainer_seconds=seconds,
        rate=rate,
        rate_for_step=for_step,
    )
