"""What no single block of a recipe can see: blocks that contradict one another. Each problem says its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from remix.config.algorithm import GAEAdvantage, KLBudgetTrigger, MixPolicyPhase
from remix.config.data import LengthReward
from remix.config.model import IA3Adapter, LoraAdapter
from remix.config.rollout import LARGEST_SWAPPED_RANK, VLLMEngineConfig, VLLMServerConfig

if TYPE_CHECKING:
    from remix.config.recipe import Recipe


def contradictions(recipe: Recipe) -> Iterator[str]:
    """What no single block can see; each says the remedy."""
    rollout, batch, kl = recipe.rollout, recipe.batch, recipe.kl
    gae = isinstance(recipe.advantage, GAEAdvantage)
    if recipe.imitates:
        yield from _imitation(recipe)
    elif not gae and rollout.group_size < 2:
        yield (
            f"advantage.type {recipe.advantage.type} compares responses to one prompt: "
            "set rollout.group_size to 2 or more, or advantage.type to gae"
        )
    if gae and (rollout.drop_uniform_groups or rollout.refill.max_rounds):
        yield (
            "under advantage.type gae equal rewards still carry a gradient: "
            "remove rollout.drop_uniform_groups and rollout.refill, or choose a group-relative advantage"
        )
    if not recipe.drops_uniform_groups and rollout.refill.max_rounds:
        yield "rollout.refill replaces dropped groups: set rollout.drop_uniform_groups to true, or remove refill"
    if batch.minibatches > batch.prompts * rollout.group_size:
        yield (
            f"batch.minibatches ({batch.minibatches}) exceeds the {batch.prompts * rollout.group_size} responses "
            "of a batch (batch.prompts x rollout.group_size): lower it"
        )
    for index, phase in enumerate(recipe.phases):
        last = index == len(recipe.phases) - 1
        if last and phase.until:
            yield f"phases.{index} is the last and runs to the end: remove its `until`, or add a phase after it"
        if not last and not phase.until:
            yield f"phases.{index} never ends: give it `until`, for example [{{type: steps, after: 50}}]"
        if isinstance(phase, MixPolicyPhase) and phase.off_policy_fraction > 0:
            fresh = recipe.fresh_prompts(phase)
            if not 0 < fresh < batch.prompts:
                yield (
                    f"phases.{index}.off_policy_fraction {phase.off_policy_fraction} of batch.prompts {batch.prompts} "
                    f"leaves {fresh} fresh and {batch.prompts - fresh} replayed prompts: raise batch.prompts"
                )
        if kl.weight == 0 and any(isinstance(trigger, KLBudgetTrigger) for trigger in phase.until):
            yield f"phases.{index}: a kl_budget needs the KL measured: set kl.weight above 0, or remove the trigger"
    if kl.place == "reward" and kl.estimator == "full":
        yield "kl.estimator full is not a per-token estimate: set kl.place to loss, or kl.estimator to k1, k2 or k3"
    if recipe.alignment is not None and getattr(recipe.adapter, "path", None) is None:
        yield "alignment is with the adapter that the run begins from: set adapter.path"
    if recipe.alignment is not None and recipe.alignment.importance == "change" and recipe.alignment.initial is None:
        yield "alignment.importance change compares with an untrained adapter: set alignment.initial"
    if recipe.alignment is not None and recipe.reincarnation.lora == "merge":
        yield "alignment compares with an adapter that reincarnation.lora merge folds away: set that to snapshot"
    if rollout.overlap:
        yield from _overlap(recipe)
    if recipe.continual is not None:
        yield from _continual(recipe)
    yield from _adapter(recipe)
    if "{problem}" not in recipe.prompt.template:
        yield "prompt.template must contain {problem}, where the problem's text goes"
    for index, reward in enumerate(recipe.rewards):
        if isinstance(reward, LengthReward) and reward.max_tokens > rollout.max_tokens:
            yield (
                f"rewards.{index}.max_tokens ({reward.max_tokens}) exceeds rollout.max_tokens "
                f"({rollout.max_tokens}), so the full penalty is never reached: lower it"
            )


def _imitation(recipe: Recipe) -> Iterator[str]:
    """What makes no sense where responses are demonstrations."""
    if recipe.rollout.group_size != 1:
        yield "objective.type sft has one demonstration to a prompt: set rollout.group_size to 1"
    if isinstance(recipe.advantage, GAEAdvantage):
        yield "objective.type sft knows no rewards for a critic to learn: leave out advantage"
    if recipe.kl.weight and (recipe.kl.estimator != "full" or recipe.kl.place != "loss"):
        yield (
            "objective.type sft trains on tokens that the policy did not sample, from which its KL cannot be "
            "estimated: set kl.weight to 0, or kl.estimator to full"
        )
    if any(isinstance(phase, MixPolicyPhase) for phase in recipe.phases):
        yield "objective.type sft has nothing to replay: give phases of type on_policy alone"


def _overlap(recipe: Recipe) -> Iterator[str]:
    """What cannot be had where a step's rollouts are sampled before the step before it is over."""
    engine = recipe.rollout.engine
    if recipe.imitates:
        yield "rollout.overlap: objective.type sft samples nothing: set it to false"
    elif not (isinstance(engine, VLLMServerConfig) or (isinstance(engine, VLLMEngineConfig) and engine.own_process)):
        yield (
            f"rollout.overlap: an engine of type {engine.type} in the trainer's process cannot sample while that "
            "updates: set rollout.engine to {type: vllm, own_process: true} or {type: vllm_server}, or overlap to false"
        )
    for index, phase in enumerate(recipe.phases):
        if any(isinstance(trigger, KLBudgetTrigger) for trigger in phase.until):
            yield (
                f"phases.{index}: whether a kl_budget ends the phase shows after the update, when the next step is "
                "sampled already: choose another trigger, or set rollout.overlap to false"
            )
    if recipe.kl.place == "reward" and recipe.kl.uses_precedent:
        yield (
            "kl.place reward measures the policy that sampled against the one before it, which under rollout.overlap "
            "is no longer kept: set kl.place to loss, leave out kl.lambda_schedule, or set overlap to false"
        )


def _continual(recipe: Recipe) -> Iterator[str]:
    """What does not go with tasks one after the other."""
    assert recipe.continual is not None
    if recipe.adapter.type == "none":
        yield "continual merges adapters: set adapter.type, for example to lora"
    if getattr(recipe.adapter, "path", None) is not None:
        yield "continual begins every task with an adapter of its own: remove adapter.path"
    if recipe.alignment is not None:
        yield "continual aligns by its method: put the keys of alignment into continual.method.alignment"
    if recipe.reincarnation.lora == "merge":
        yield "continual needs one base for all tasks: set reincarnation.lora to snapshot"
    if recipe.eval.benchmarks or recipe.eval.tasks:
        yield "continual evaluates its own tasks after each: remove eval.benchmarks and eval.tasks"
    if recipe.max_steps is not None:
        yield "continual learns every task by all its steps: set steps in place of max_steps"
    dora = isinstance(recipe.adapter, LoraAdapter) and recipe.adapter.dora
    if dora and getattr(recipe.continual.method, "form", "factors") == "delta":
        yield "continual.method.form delta merges plain products, which a DoRA is not: set it to factors"


def _adapter(recipe: Recipe) -> Iterator[str]:
    adapter, engine, merges = recipe.adapter, recipe.rollout.engine, recipe.reincarnation.lora == "merge"
    dora = isinstance(adapter, LoraAdapter) and adapter.dora
    if merges and dora:
        yield "reincarnation.lora merge cannot start a DoRA adapter anew: set it to snapshot, or adapter.dora to false"
    elif merges and not isinstance(adapter, LoraAdapter | IA3Adapter):
        yield (
            f"reincarnation.lora merge needs adapter.type lora or ia3: {_NOT_FOLDED[adapter.type]}; set it to snapshot"
        )
    if adapter.type == "prefix" and recipe.model.gradient_checkpointing is True:
        yield (
            "adapter.type prefix sits in the attention cache, which model.gradient_checkpointing does without: "
            "set that to false, or adapter.type to prompt"
        )
    if isinstance(engine, VLLMServerConfig):
        yield from _server(engine)
    if engine.type != "hf" and adapter.type in ("prefix", "prompt"):
        yield (
            f"rollout.engine.type {engine.type} does not serve adapter.type {adapter.type}: "
            "set rollout.engine.type to hf"
        )
    if not isinstance(engine, VLLMEngineConfig) or adapter.type in ("prefix", "prompt"):
        return
    if engine.lora == "hot_swap" and (adapter.type != "lora" or dora or merges):
        what = "DoRA" if dora else "reincarnation.lora merge" if merges else f"adapter.type {adapter.type}"
        yield f"rollout.engine.lora hot_swap hands vLLM a plain LoRA, which {what} is not: set it to merged"
    elif engine.lora == "hot_swap" and isinstance(adapter, LoraAdapter) and adapter.rank > LARGEST_SWAPPED_RANK:
        yield (
            f"rollout.engine.lora hot_swap goes up to rank {LARGEST_SWAPPED_RANK}, adapter.rank is {adapter.rank}: "
            "set rollout.engine.lora to merged"
        )


def _server(engine: VLLMServerConfig) -> Iterator[str]:
    started = ("replicas", "devices", "port", "tensor_parallel", "restarts", "memory_fraction", "kv_cache_gib")
    vain = [key for key in (*started, "enforce_eager") if key in engine.model_fields_set]
    if engine.urls and vain:
        yield (
            f"rollout.engine.{vain[0]} is for servers that the run starts, and urls names those that are there: "
            "remove either, and give what it says to remix.rollout.serve"
        )
    if engine.devices and len(engine.devices) != engine.replicas:
        yield (
            f"rollout.engine.devices names the GPUs of {len(engine.devices)} servers, replicas is {engine.replicas}: "
            "give each replica its own"
        )
    for url in engine.urls:
        if not url.startswith(("http://", "https://")):
            yield f"rollout.engine.urls: '{url}' is no address: give it as http://HOST:PORT"
    if len(set(engine.urls)) < len(engine.urls):
        yield "rollout.engine.urls names a server twice: name each once"
    if engine.lora == "hot_swap":
        yield (
            "rollout.engine.lora hot_swap is for type vllm: servers take whole checkpoints, so that what they hold "
            "has one version. Set it to merged"
        )


_NOT_FOLDED = {
    "none": "there is nothing to fold in",
    "layers": "the layers are weights themselves, with nothing to fold in",
    "prefix": "a prefix is no part of any weight",
    "prompt": "virtual tokens are no part of any weight",
}
