"""The loss of a recipe: which equations, with which weights, under one denominator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor

from remix.algorithms import (
    aggregate,
    cispo,
    clipped_value_loss,
    gspo,
    importance_weighted,
    is_clipped,
    kl_convex,
    kl_estimate,
    log_ratio,
    mix_ppg,
    negative_log_likelihood,
    sequence_log_ratio,
    truncated_importance_weight,
)
from remix.config import GAEAdvantage, Recipe
from remix.types import Batch, LossInputs, LossOutput, Sample


class Objective:
    """L = L_policy + β·L_KLC - c·H + L_value, per token, reduced once."""

    def __init__(self, recipe: Recipe) -> None:
        self.config = recipe.objective
        self.kl = recipe.kl
        self.value = recipe.advantage if isinstance(recipe.advantage, GAEAdvantage) else None
        self.constant = recipe.objective.constant or float(recipe.rollout.max_tokens)
        # transformers' generate is the trainer's own module: its mismatch is rounding, not another policy.
        self.sampler_weight_cap = None if recipe.rollout.engine.type == "hf" else recipe.objective.sampler_weight_cap

    def denominator(self, samples: Sequence[Sample]) -> float:
        """Of one optimiser step, from all its samples over all ranks and micro-batches."""
        if self.config.aggregate == "token":
            return float(sum(sample.num_tokens for sample in samples))
        return len(samples) * (self.constant if self.config.aggregate == "constant" else 1.0)

    def __call__(self, inputs: LossInputs, *, kl_lambda: float, denominator: float) -> LossOutput:
        """`kl_lambda` is λ(k); `denominator` counts the whole optimiser step."""
        batch = inputs.batch

        def reduce(per_token_BT: Tensor) -> Tensor:
            return aggregate(per_token_BT, batch.response_mask, mode=self.config.aggregate, denominator=denominator)

        terms = {"policy": reduce(self._policy_loss(inputs))}
        if self.config.entropy_weight:
            terms["entropy"] = -self.config.entropy_weight * reduce(inputs.entropy)
        if self.kl.weight and self.kl.place == "loss":
            terms["kl"] = self.kl.weight * reduce(self._kl(inputs, kl_lambda))
        if self.value is not None:
            assert inputs.values is not None
            assert batch.values is not None
            assert batch.returns is not None
            value_loss = clipped_value_loss(inputs.values, batch.values, batch.returns, clip=self.value.value_clip)
            terms["value"] = self.value.value_weight * reduce(value_loss)
        loss = torch.stack(list(terms.values())).sum()
        return LossOutput(loss, {name: term.detach() for name, term in terms.items()}, self._diagnose(inputs))

    def _policy_loss(self, inputs: LossInputs) -> Tensor:
        batch, config = inputs.batch, self.config
        policies = (inputs.logprobs, batch.behaviour_logprobs, batch.proximal_logprobs, batch.advantages)
        clip_low, clip_high = config.clip_low, config.clip_high
        match config.type:
            case "sft":
                return negative_log_likelihood(inputs.logprobs)
            case "gspo":
                loss = gspo(*policies, batch.response_mask, clip_low=clip_low, clip_high=clip_high)
            case "cispo":
                loss = cispo(*policies, clip_low=clip_low, clip_high=clip_high)
            case "mix_ppg":
                loss = mix_ppg(*policies, clip_low=clip_low, clip_high=clip_high)
            case unknown:
                assert_never(unknown)
        if self.sampler_weight_cap is not None:
            loss = loss * truncated_importance_weight(
                batch.behaviour_logprobs, batch.sampler_logprobs, self.sampler_weight_cap
            )
        return loss

    def _kl(self, inputs: LossInputs, kl_lambda: float) -> Tensor:
        batch = inputs.batch
        reference, precedent = self._divergences(inputs)
        convex = kl_convex(reference, precedent, kl_lambda)
        # The exact divergence has no sampled token in it that could need a weight.
        if self.kl.estimator == "full" or self.kl.importance_weighted == "none":
            return convex
        weighted = importance_weighted(convex, log_ratio(inputs.logprobs, batch.behaviour_logprobs))
        if self.kl.importance_weighted == "all":
            return weighted
        return torch.where(batch.policy_lag[:, None] > 0, weighted, convex)

    def _divergences(self, inputs: LossInputs) -> tuple[Tensor | None, Tensor | None]:
        """[B, T] KL to the reference and to the precedent, as the recipe estimates it; None where not in use."""
        if self.kl.estimator == "full":
            return inputs.kl_reference, inputs.kl_precedent
        anchors = (inputs.batch.reference_logprobs, inputs.batch.precedent_logprobs)
        reference, precedent = (
            None if anchor is None else kl_estimate(inputs.logprobs, anchor, self.kl.estimator) for anchor in anchors
        )
        return reference, precedent

    @torch.no_grad()
    def _diagnose(self, inputs: LossInputs) -> dict[str, Tensor]:
        batch, mask = inputs.batch, inputs.batch.response_mask
        reference, precedent = self._divergences(inputs)
        tokens = {"lag": batch.policy_lag[:, None].expand_as(mask), "entropy": inputs.entropy}
        if self.config.type != "sft":
            tokens |= self._ratios(inputs)
        if reference is not None:
            tokens["kl_reference"] = reference
        if precedent is not None:
            tokens["kl_precedent"] = precedent
        return {name: tensor[mask].detach().cpu() for name, tensor in tokens.items()}

    def _ratios(self, inputs: LossInputs) -> dict[str, Tensor]:
        """[B, T] of what compares the policy with those before it."""
        batch = inputs.batch
        policies = (inputs.logprobs, batch.behaviour_logprobs, batch.proximal_logprobs)
        compared = self._sequence_ratios(batch, inputs.logprobs) if self.config.type == "gspo" else policies
        return {
            "log_ratio": log_ratio(inputs.logprobs, batch.behaviour_logprobs),
            "update_kl": kl_estimate(inputs.logprobs, batch.proximal_logprobs, "k3"),
            "clipped": is_clipped(
                *compared, batch.advantages, clip_low=self.config.clip_low, clip_high=self.config.clip_high
            ),
        }

    @staticmethod
    def _sequence_ratios(batch: Batch, logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """GSPO's ratios at every token, as log-probs over a behaviour of 0."""
        of = (
            sequence_log_ratio(p, batch.behaviour_logprobs, batch.response_mask)
            for p in (logprobs, batch.proximal_logprobs)
        )
        current, proximal = (ratio_B[:, None].expand_as(logprobs) for ratio_B in of)
        return current, torch.zeros_like(logprobs), proximal
