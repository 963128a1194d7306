"""Policy reincarnation (arXiv 2507.06892): base ← policy, and training starts over from there."""

from __future__ import annotations

import numpy as np
import torch

from remix.config import Recipe
from remix.errors import TrainingError
from remix.models.adapters import merge_adapter
from remix.models.policy import Policy
from remix.replay import ReplayBuffer
from remix.training.state import TrainState
from remix.training.update import Updater
from remix.types import Rollout

MERGE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest |log-prob difference| that folding an adapter into the base weights may leave: rounding."""


def reincarnate(recipe: Recipe, policy: Policy, updater: Updater, replay: ReplayBuffer, state: TrainState) -> None:
    """Between two steps: the reference becomes the policy itself, and the next phase begins."""
    config = recipe.reincarnation
    if config.lora == "merge":
        _merge(recipe, policy, state.step)
        state.base_merged = True
    policy.reference = policy.snapshot() if recipe.kl.weight else None
    if config.lora == "merge" and recipe.keeps_precedent:
        # Older snapshots are of an adapter on other base weights.
        policy.precedent = policy.next_precedent = policy.snapshot()
    if config.empty_replay:
        replay.clear()
    if config.reset_critic and policy.module.value_head is not None:
        policy.reset_value_head()
    if config.reset_optimizer or config.lora == "merge":
        updater.reset_optimizer()
    state.phase.advance(state.step, state.rollouts, restart_lambda=config.restart_lambda)


def _merge(recipe: Recipe, policy: Policy, step: int) -> None:
    """Folds the adapter in, and proves by log-prob equality that the policy stayed the same."""
    probe = _probe(policy)
    before = policy.score([probe], tokens_per_microbatch=recipe.batch.tokens_per_microbatch)[0].logprobs
    # The fresh adapter is the same on every process, whose generators may have come to differ.
    seed = int(np.random.default_rng((recipe.seed, step, 3)).integers(2**31))
    devices = [policy.device] if policy.device.type == "cuda" else []
    with policy.changing_lm() as lm, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        merge_adapter(lm)
    after = policy.score([probe], tokens_per_microbatch=recipe.batch.tokens_per_microbatch)[0].logprobs
    worst = (after - before).abs().max().item()
    if not worst <= MERGE_TOLERANCE[recipe.model.dtype]:
        raise TrainingError(
            f"merging the adapter changed the policy by {worst:.3g} nats: set reincarnation.lora to snapshot, or "
            "model.dtype to float32"
        )


def _probe(policy: Policy) -> Rollout:
    """Tokens of every kind, as one sequence: any policy has log-probs of them."""
    tokens = torch.arange(policy.module.lm.config.get_text_config().vocab_size)
    tokens = tokens[~torch.isin(tokens, torch.tensor(policy.module.never))][:256]
    return Rollout(
        prompt_ids=tokens[:1],
        response_ids=tokens[1:],
        sampler_logprobs=torch.zeros(len(tokens) - 1),
        policy_version=-1,
        finish_reason="length",
        seed=0,
        text="",
    )
