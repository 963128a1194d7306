"""The preflight: what a recipe amounts to, in numbers, before any model is loaded.

Prompts x group x minibatches x passes x processes is the arithmetic that nobody can do in their head; here it is done
and printed, and what contradicts itself is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from remix.config import (
    HFEngineConfig,
    HubTask,
    IA3Adapter,
    KLBudgetTrigger,
    LayersAdapter,
    LengthDropTrigger,
    LoraAdapter,
    PhaseConfig,
    PrefixAdapter,
    PromptAdapter,
    Recipe,
    RewardPlateauTrigger,
    RolloutsTrigger,
    SeparateCritic,
    StepsTrigger,
    Trigger,
    VLLMEngineConfig,
    VLLMServerConfig,
)
from remix.evaluation.overrides import evaluation_responses
from remix.training.activations import (
    Activations,
    Checkpointing,
    choose_checkpointing,
    device_memory,
    estimate_activations,
)
from remix.training.memory import Memory, estimate_memory
from remix.training.model_shape import find_shape
from remix.training.refusals import is_local, refuse_contradictions
from remix.training.schedule import first_step_rollouts, schedules, step_rollouts

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Span:
    """A count between two bounds, both included; exact where they agree."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class AnchorForwards:
    """Sequences of a step that pass through a model without gradient, before its updates."""

    proximal: int
    reference: int
    precedent: int
    critic: int
    """Under a separate critic; a shared one comes with the proximal pass."""


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """A phase of the run and one usual training step of it, all processes together."""

    type: str
    start: Span
    """The step it begins at."""
    steps: Span
    """Training steps in this run; 0 = not reached."""
    until: tuple[str, ...]
    """What ends it, in words; empty = the end of the run."""
    prompts: int
    group_size: int
    rollouts: int
    """Responses of the batch, fresh and replayed."""
    fresh_prompts: int
    fresh_rollouts: int
    replayed_prompts: int
    replayed_rollouts: int
    first_step_rollouts: int
    """Fresh rollouts of the phase's first step, when there may be nothing to replay yet."""
    refill_rollouts: int
    """At most, beyond the fresh ones."""
    tokens: int
    """Prompt and response tokens of the batch, at most."""
    anchor_forwards: AnchorForwards
    utd_ratio: int
    minibatches: int
    rollouts_per_minibatch: int
    """At most."""
    rollouts_per_process: int
    """Of a minibatch, at most."""
    optimizer_steps: int
    """Of one training step."""


@dataclass(frozen=True, slots=True)
class Plan:
    run_dir: str
    model: str
    adapter: str
    advantage: str
    critic: bool
    engine: str
    engine_way: str
    """How the policy gets there."""
    world_size: int
    phases: tuple[PhasePlan, ...]
    steps: int
    """Training steps of this run."""
    of_steps: int
    """Training steps of the whole plan, above `steps` under `max_steps`."""
    optimizer_steps: Span
    rollouts: Span
    """Generated for training, refill left out."""
    refill_rollouts: int
    """At most."""
    evaluations: int
    evaluation_rollouts: int
    memory: Memory
    """Of one process."""
    activations: Activations | None
    """Of one process; None = the model's size is unknown."""
    checkpointing: Checkpointing
    """As it would be decided on this machine."""
    notes: tuple[str, ...]
    """Assumptions behind the numbers."""


def make_plan(recipe: Recipe, world_size: int = 1) -> Plan:
    """Raises ValueError where the recipe contradicts itself, naming key and remedy."""
    refuse_contradictions(recipe, world_size)
    lengths = list(schedules(recipe))
    phases = tuple(_phase_plan(recipe, index, lengths, world_size) for index in range(len(recipe.phases)))

    def total(of_phase: Callable[[PhasePlan, int], int]) -> Span:
        return _span(sum(of_phase(*pair) for pair in zip(phases, schedule, strict=True)) for schedule in lengths)

    evaluations, memory = _evaluations(recipe), estimate_memory(recipe)
    shape = None if memory.unknown else find_shape(recipe.model)
    here = device_memory() if recipe.model.gradient_checkpointing == "auto" else (0, "")
    return Plan(
        run_dir=recipe.run_dir,
        model=recipe.model.path,
        adapter=_adapter_in_words(recipe),
        advantage=recipe.advantage.type,
        critic=recipe.critic is not None,
        engine=recipe.rollout.engine.type,
        engine_way=_engine_way(recipe),
        world_size=world_size,
        phases=phases,
        steps=recipe.last_step,
        of_steps=recipe.steps,
        optimizer_steps=total(lambda phase, steps: phase.optimizer_steps * steps),
        rollouts=total(_phase_rollouts),
        refill_rollouts=total(_phase_rollouts).high * recipe.rollout.refill.max_rounds,
        evaluations=evaluations,
        evaluation_rollouts=evaluations * evaluation_responses(recipe),
        memory=memory,
        activations=None if shape is None else estimate_activations(recipe, shape),
        checkpointing=choose_checkpointing(recipe, memory, here, world_size=world_size),
        notes=tuple(_notes(recipe, phases, memory)),
    )


def _phase_plan(recipe: Recipe, index: int, lengths: list[tuple[int, ...]], world_size: int) -> PhasePlan:
    phase, batch, group = recipe.phases[index], recipe.batch, recipe.rollout.group_size
    rollouts, fresh = batch.prompts * group, step_rollouts(recipe, phase)
    per_minibatch = -(-rollouts // batch.minibatches)
    return PhasePlan(
        type=phase.type,
        start=_span(sum(schedule[:index]) for schedule in lengths),
        steps=_span(schedule[index] for schedule in lengths),
        until=tuple(in_words(trigger) for trigger in phase.until),
        prompts=batch.prompts,
        group_size=group,
        rollouts=rollouts,
        fresh_prompts=recipe.fresh_prompts(phase),
        fresh_rollouts=fresh,
        replayed_prompts=batch.prompts - recipe.fresh_prompts(phase),
        replayed_rollouts=rollouts - fresh,
        first_step_rollouts=first_step_rollouts(recipe, phase, first=index == 0),
        refill_rollouts=fresh * recipe.rollout.refill.max_rounds,
        tokens=rollouts * (recipe.prompt.max_tokens + recipe.rollout.max_tokens),
        anchor_forwards=_anchor_forwards(recipe, phase),
        utd_ratio=phase.utd_ratio,
        minibatches=batch.minibatches,
        rollouts_per_minibatch=per_minibatch,
        rollouts_per_process=-(-per_minibatch // world_size),
        optimizer_steps=phase.utd_ratio * batch.minibatches,
    )


def _anchor_forwards(recipe: Recipe, phase: PhaseConfig) -> AnchorForwards:
    rollouts, fresh = recipe.batch.prompts * recipe.rollout.group_size, step_rollouts(recipe, phase)
    # The exact KL keeps no log-probs: it passes the whole batch through the anchor at every update.
    whole = rollouts * phase.utd_ratio if recipe.kl.estimator == "full" else None
    # In the reward the KL is part of what a rollout earned when it was sampled, and is not taken again.
    precedent = (whole or (fresh if recipe.kl.place == "reward" else rollouts)) * recipe.kl.uses_precedent
    ahead = fresh * recipe.rollout.overlap  # sampled by the precedent, which is asked for their log-probs anyway
    return AnchorForwards(
        proximal=rollouts * (not recipe.defers_proximal),
        reference=(whole or fresh) * (recipe.kl.weight > 0),
        precedent=precedent + ahead if whole else max(precedent, ahead),
        critic=rollouts * isinstance(recipe.critic, SeparateCritic),
    )


def _phase_rollouts(phase: PhasePlan, steps: int) -> int:
    return phase.first_step_rollouts + (steps - 1) * phase.fresh_rollouts if steps else 0


def _evaluations(recipe: Recipe) -> int:
    """Before the first step, after every so many, after the last."""
    if not recipe.last_step:
        return 1
    if not recipe.eval.every:
        return 2
    return 1 + -(-recipe.last_step // recipe.eval.every)


def _adapter_in_words(recipe: Recipe) -> str:
    adapter = recipe.adapter
    match adapter:
        case LoraAdapter():
            words = f"{'DoRA' if adapter.dora else 'LoRA'}, rank {adapter.rank}"
        case IA3Adapter():
            words = f"(IA)³ on {', '.join(adapter.targets)}"
        case PrefixAdapter():
            words = f"a prefix of {adapter.tokens} tokens"
        case PromptAdapter():
            words = f"a prompt of {adapter.tokens} tokens"
        case LayersAdapter():
            last = "the last block" if adapter.last_blocks == 1 else f"the last {adapter.last_blocks} blocks"
            blocks = [last] if adapter.last_blocks else []
            words = ", ".join([*blocks, *(name for name in ("norms", "biases", "head") if getattr(adapter, name))])
        case _:
            return "all weights"
    return f"{words}, from {adapter.path}" if adapter.path else words


def _engine_way(recipe: Recipe) -> str:
    engine = recipe.rollout.engine
    if isinstance(engine, HFEngineConfig):
        return "the trainer's own module"
    if engine.lora == "hot_swap":
        return "the LoRA after each step, beside the base weights"
    merged = "" if recipe.adapter.type == "none" else ", the adapter merged into them"
    if isinstance(engine, VLLMServerConfig):
        count, whose = len(engine.urls) or engine.replicas, "" if engine.urls else " that the run starts"
        merged += f", by files, to {count} server{'s' * (count > 1)}{whose}"
    return f"all weights after each step{merged}"


def _span(values: Iterator[int]) -> Span:
    values_ = list(values)
    return Span(min(values_), max(values_))


def in_words(trigger: Trigger) -> str:
    match trigger:
        case StepsTrigger():
            return f"{trigger.after:,} steps"
        case RolloutsTrigger():
            return f"{trigger.after:,} rollouts"
        case RewardPlateauTrigger():
            return f"reward gains < {trigger.min_gain:g} in {trigger.window} steps"
        case LengthDropTrigger():
            return f"length below {trigger.fraction:.0%} of its start"
        case KLBudgetTrigger():
            return f"KL above {trigger.nats:g} nats"


def _not_pinned(recipe: Recipe) -> Iterator[str]:
    """What comes from the hub, but from no commit in particular."""
    named = [("model", recipe.model.path, recipe.model.revision)]
    if isinstance(recipe.critic, SeparateCritic) and recipe.critic.path:
        named.append(("advantage.critic", recipe.critic.path, recipe.critic.revision))
    named += [
        (f"tasks.{index}", task.path, task.revision)
        for index, task in enumerate(recipe.tasks)
        if isinstance(task, HubTask) and not Path(task.path).is_file()
    ]
    for key, path, revision in named:
        if not is_local(path) and not COMMIT.fullmatch(revision or ""):
            yield f"{path}: not pinned: what the hub serves may change; set {key}.revision to a commit (40 hex digits)."


def _notes(recipe: Recipe, phases: tuple[PhasePlan, ...], memory: Memory) -> Iterator[str]:
    yield from _not_pinned(recipe)
    if any(phase.first_step_rollouts > phase.fresh_rollouts for phase in phases):
        yield (
            "Replay is empty at a mix_policy phase's first step, so that batch is all fresh. From the second on it is "
            "assumed to hold enough groups; where it does not, fresh ones take their place."
        )
    if recipe.drops_uniform_groups:
        yield "Groups whose rewards are all equal are left out of the updates, so batches may be smaller than planned."
    if recipe.rollout.overlap:
        yield (
            "While a step is scored and updates, the next is sampled (rollout.overlap): a step takes as long as the "
            "longer of the two, and from the second step of a phase on fresh rollouts are one policy old (policy_lag "
            "1), replayed ones up to window + 1."
        )
    if any(phase.steps.low != phase.steps.high for phase in phases):
        yield "Where a trigger depends on what the run measures, counts are bounds over all its possible ends."
    if memory.unknown:
        return
    yield "Activations come on top while a micro-batch of batch.tokens_per_microbatch is computed."
    if recipe.model.gradient_checkpointing == "auto":
        yield "model.gradient_checkpointing auto is decided when the run starts, by the memory of its own device."
    if isinstance(recipe.rollout.engine, VLLMEngineConfig):
        yield (
            f"On a GPU vLLM takes memory_fraction {recipe.rollout.engine.memory_fraction:g} of it, "
            "weights and cache together."
        )
