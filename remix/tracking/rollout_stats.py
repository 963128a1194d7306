"""What the rollouts of a step look like, before anything is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

import torch

from remix.types import RolloutGroup


def rollout_metrics(groups: Sequence[RolloutGroup], reflection_patterns: Sequence[str]) -> dict[str, float]:
    """Reward, verdicts, length and self-reflection of every rollout sampled in a step, kept or not."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    if not scores:
        return {}
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    patterns = [pattern.lower() for pattern in reflection_patterns]
    metrics = {
        "reward/mean": fmean(score.value for score in scores),
        "reward/std": pstdev(score.value for score in scores),
        "rollouts/uniform_groups": fmean(group.uniform for group in groups),
        "tokens/sampled": float(sum(lengths)),
        "response/length": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/truncated": fmean(rollout.truncated for rollout in rollouts),
        "response/self_reflection": fmean(any(p in r.text.lower() for p in patterns) for r in rollouts),
    }
    for verdict in ("correct", "no_answer", "timeout", "error"):
        metrics[f"verdict/{verdict}"] = fmean(score.verdict == verdict for score in scores)
    names = sorted({name for score in scores for name in score.parts})
    for name in names:
        metrics[f"reward/{name}"] = fmean(score.parts[name] for score in scores)
    return metrics


def sampler_mismatch(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """How far the inference engine's log-probs are from the trainer's, on the same tokens of the same policy."""
    pairs = [
        (rollout.behaviour_logprobs, rollout.sampler_logprobs)
        for group in groups
        for rollout in group.rollouts
        if rollout.behaviour_logprobs is not None
    ]
    if not pairs:
        return {}
    difference = torch.cat([trainer - sampler for trainer, sampler in pairs]).double()
    difference = difference[difference.isfinite()]  # rollouts with others are left out of training, and counted there
    if not difference.numel():
        return {}
    return {
        "sampler/mismatch_mean": difference.abs().mean().item(),
        "sampler/mismatch_max": difference.abs().max().item(),
        # k3 of KL(μ ‖ π): the tokens were drawn from μ.
        "sampler/mismatch_kl": (difference.exp() - 1.0 - difference).mean().item(),
    }
