"""From scored groups to samples: log-probs of every anchor, advantages, returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from remix.algorithms import (
    dr_grpo_advantage,
    group_relative_advantage,
    importance_ratio,
    kl_convex,
    kl_estimate,
    rloo_advantage,
    vtrace_gae,
    whiten,
)
from remix.config import GAEAdvantage, KLConfig, Recipe
from remix.models.policy import Policy, Snapshot, TokenScores
from remix.training.batching import cost, shared_prompts
from remix.training.distributed import Cluster
from remix.types import Rollout, RolloutGroup, Sample

GROUP_ADVANTAGES = {"grpo": group_relative_advantage, "dr_grpo": dr_grpo_advantage, "rloo": rloo_advantage}


class Experience:
    """Completes rollouts with what the trainer's policies say of them."""

    def __init__(self, recipe: Recipe, policy: Policy, cluster: Cluster) -> None:
        self.recipe = recipe
        self.policy = policy
        self.cluster = cluster
        self.defers = recipe.defers_proximal and not policy.drops_out
        """Whether the proximal log-probs are left to the first update."""

    def prepare(
        self,
        fresh: Sequence[RolloutGroup],
        replayed: Sequence[RolloutGroup],
        *,
        step: int,
        kl_lambda: float,
        reference_since: int,
    ) -> tuple[list[RolloutGroup], list[Sample]]:
        """The fresh groups, which `completed` makes ready to be stored, and the samples of the batch, fresh first.

        `reference_since` is the step of the last reincarnation: older rollouts carry another reference's log-probs.
        """
        kl, group_size = self.recipe.kl, self.recipe.rollout.group_size
        gae = isinstance(self.recipe.advantage, GAEAdvantage)
        rollouts = [rollout for group in [*fresh, *replayed] for rollout in group.rollouts]
        num_fresh = group_size * len(fresh)
        proximal, values = self._proximal(rollouts, with_values=gae)
        by_precedent = self._by_precedent(rollouts[:num_fresh], step)
        for index, logprobs in enumerate(by_precedent or proximal[:num_fresh]):
            rollouts[index] = replace(rollouts[index], behaviour_logprobs=logprobs)
        if kl.weight and kl.estimator != "full":
            unknown = [
                i for i, r in enumerate(rollouts) if r.reference_logprobs is None or r.policy_version < reference_since
            ]
            scores = self._score([rollouts[i] for i in unknown], self.policy.reference)
            for index, score in zip(unknown, scores, strict=True):
                rollouts[index] = replace(rollouts[index], reference_logprobs=score.logprobs)
        precedent: list[Tensor | None] = [None] * len(rollouts)
        if kl.uses_precedent and kl.estimator != "full":
            # In the reward the KL is that of the policy which sampled, so only fresh rollouts are asked about.
            asked = num_fresh if kl.place == "reward" else len(rollouts)
            others = self._score(rollouts[len(by_precedent) : asked], self.policy.precedent)
            precedent[:asked] = [*by_precedent, *(score.logprobs for score in others)]
        if kl.uses_precedent and kl.place == "reward":
            for index in range(num_fresh):
                rollouts[index] = replace(rollouts[index], precedent_logprobs=precedent[index])
            precedent = [None] * len(rollouts)
        if not gae:
            advantages = self._group_advantages(rollouts[:num_fresh], kl_lambda)
            for index, advantage in enumerate(advantages):
                rollouts[index] = replace(rollouts[index], advantage=advantage)

        complete = [
            RolloutGroup(group.prompt, tuple(rollouts[i * group_size : (i + 1) * group_size]))
            for i, group in enumerate(fresh)
        ]
        samples = [
            Sample(
                rollout=rollout,
                policy_lag=step - rollout.policy_version,
                advantages=torch.zeros(len(rollout.response_ids)) if rollout.advantage is None else rollout.advantage,
                proximal_logprobs=logprobs,
                precedent_logprobs=anchor,
                values=value,
            )
            for rollout, logprobs, value, anchor in zip(rollouts, proximal, values, precedent, strict=True)
        ]
        samples = [sample for sample in samples if self._trainable(sample)]
        return complete, self._with_returns(samples, kl_lambda) if gae and samples else samples

    def _by_precedent(self, fresh: Sequence[Rollout], step: int) -> list[Tensor]:
        """Of what was sampled while the last step updated, by the policy as that began: π_{k-1}. Else nothing."""
        ahead = [rollout for rollout in fresh if rollout.policy_version < step]
        assert len(ahead) in (0, len(fresh)), "the fresh rollouts of a step are all by one policy"
        return [score.logprobs for score in self._score(ahead, self.policy.precedent)] if ahead else []

    @staticmethod
    def completed(
        fresh: Sequence[RolloutGroup], samples: Sequence[Sample], trained: Sequence[Sample]
    ) -> list[RolloutGroup]:
        """The fresh groups of `prepare`, ready to be stored. `trained`: its samples, as the updates have made them."""
        learnt = {before.rollout: after.rollout for before, after in zip(samples, trained, strict=True)}
        return [
            replace(group, rollouts=tuple(learnt.get(rollout, rollout) for rollout in group.rollouts))
            for group in fresh
        ]

    def _proximal(
        self, rollouts: Sequence[Rollout], *, with_values: bool
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Log-probs of π_k, and the critic's values; None where they are not asked for."""
        nothing = [None] * len(rollouts)
        if self.defers:
            return nothing, nothing
        if self.recipe.imitates:  # no ratio compares a demonstration with what the policy was
            return [rollout.sampler_logprobs for rollout in rollouts], nothing
        scores = self._score(rollouts, with_values=with_values)
        return [score.logprobs for score in scores], [score.values for score in scores]

    def _score(
        self, rollouts: Sequence[Rollout], anchor: Snapshot | None = None, with_values: bool = False
    ) -> list[TokenScores]:
        together = shared_prompts(rollouts, self.cluster.world_size)

        def work(share: Sequence[list[int]]) -> list[list[TokenScores]]:
            budget = self.recipe.batch.tokens_per_microbatch
            chosen = [rollouts[i] for indices in share for i in indices]
            scores = iter(
                self.policy.score(chosen, tokens_per_microbatch=budget, anchor=anchor, with_values=with_values)
            )
            return [[next(scores) for _ in indices] for indices in share]

        costs = [cost([rollouts[i] for i in indices]) for indices in together]
        found = self.cluster.map(work, together, "the log-probs of the anchors", costs)
        in_order = dict(zip(chain.from_iterable(together), chain.from_iterable(found), strict=True))
        return [in_order[index] for index in range(len(rollouts))]

    def _trainable(self, sample: Sample) -> bool:
        rollout = sample.rollout
        if sample.policy_lag and rollout.behaviour_logprobs is None:
            return False  # it was not trained on when it was fresh either, and no update has said them
        if self.recipe.rollout.mask_overlong and rollout.truncated:
            return False
        if rollout.score is not None and rollout.score.failed:
            return False
        known = (
            rollout.sampler_logprobs,
            rollout.behaviour_logprobs,
            rollout.reference_logprobs,
            sample.proximal_logprobs,
            sample.precedent_logprobs,
            sample.values,
        )
        return all(tensor is None or bool(tensor.isfinite().all()) for tensor in known)

    def _group_advantages(self, rollouts: Sequence[Rollout], kl_lambda: float) -> list[Tensor]:
        """[R] each: one number for every token of a response."""
        if not rollouts:
            return []
        if self.recipe.imitates:
            return [torch.zeros(len(rollout.response_ids)) for rollout in rollouts]
        rewards = torch.tensor([_reward(rollout) for rollout in rollouts], dtype=torch.float32)
        if self.recipe.kl_in_reward:
            penalties = [kl_penalty(rollout, self.recipe.kl, kl_lambda).sum() for rollout in rollouts]
            rewards = rewards - torch.stack(penalties)
        group_size = self.recipe.rollout.group_size
        # A response that could not be graded is not trained on; at the mean of the others it moves no baseline either.
        graded = torch.tensor([not (r.score is not None and r.score.failed) for r in rollouts]).view(-1, group_size)
        groups = rewards.view(-1, group_size)
        others = (groups * graded).sum(1, keepdim=True) / graded.sum(1, keepdim=True).clamp(min=1)
        rewards = torch.where(graded, groups, others).flatten()
        advantages = GROUP_ADVANTAGES[self.recipe.advantage.type](rewards, group_size)
        return [a.expand(len(rollout.response_ids)).clone() for a, rollout in zip(advantages, rollouts, strict=True)]

    def _with_returns(self, samples: Sequence[Sample], kl_lambda: float) -> list[Sample]:
        """GAE over every sample with the critic of this step, fresh and replayed alike."""
        config = self.recipe.advantage
        assert isinstance(config, GAEAdvantage)

        def padded(rows: Sequence[Tensor | None]) -> Tensor:
            return pad_sequence([row for row in rows if row is not None], batch_first=True)

        lengths = torch.tensor([sample.num_tokens for sample in samples])
        mask_BR = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
        rewards_BR = torch.zeros(mask_BR.shape)
        rewards_BR[torch.arange(len(samples)), lengths - 1] = torch.tensor([_reward(s.rollout) for s in samples])
        if self.recipe.kl_in_reward:
            rewards_BR -= padded([kl_penalty(s.rollout, self.recipe.kl, kl_lambda) for s in samples])
        ratios_BR = torch.ones(mask_BR.shape)
        if config.vtrace_cap is not None:
            proximal = padded([s.proximal_logprobs for s in samples])
            ratios_BR = importance_ratio(proximal, padded([s.rollout.behaviour_logprobs for s in samples]))
        advantages_BR, returns_BR = vtrace_gae(
            rewards_BR,
            padded([s.values for s in samples]),
            mask_BR,
            ratios_BR,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            c_bar=config.vtrace_cap or 1.0,
        )
        if config.whiten:
            advantages_BR = whiten(advantages_BR, mask_BR)
        return [
            replace(sample, advantages=advantages_BR[i, : lengths[i]], returns=returns_BR[i, : lengths[i]])
            for i, sample in enumerate(samples)
        ]


def kl_penalty(rollout: Rollout, kl: KLConfig, kl_lambda: float) -> Tensor:
    """[R] β·KL of the policy that sampled to its anchors: what `kl.place: reward` takes off the reward."""
    assert rollout.behaviour_logprobs is not None
    reference, precedent = (
        None if anchor is None else kl_estimate(rollout.behaviour_logprobs, anchor, kl.estimator)
        for anchor in (rollout.reference_logprobs, rollout.precedent_logprobs)
    )
    return kl.weight * kl_convex(reference, precedent, kl_lambda)


def _reward(rollout: Rollout) -> float:
    assert rollout.score is not None, "rollouts are scored before they become samples"
    return rollout.score.value
