"""The optimiser steps of one training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from remix.checkpoint import save_tensors
from remix.config import OptimizerConfig, Recipe
from remix.errors import TrainingError
from remix.models.actor_critic import ActorCritic, AnchorStates, PolicyOutput
from remix.models.parts import Hollow
from remix.models.policy import Policy
from remix.tracking.token_stats import TokenStats
from remix.training.batching import begun_by, collate, cost, shared_prompts
from remix.training.distributed import Cluster
from remix.training.objective import Objective
from remix.training.stepper import Stepper
from remix.types import Batch, LossInputs, Sample

MOST_DUMPS = 16
"""Skipped batches that a run leaves on disk."""


class Updater:
    """m passes over the batch, each in minibatches of one optimiser step."""

    def __init__(self, recipe: Recipe, policy: Policy, objective: Objective, cluster: Cluster) -> None:
        self.recipe = recipe
        self.policy = policy
        self.objective = objective
        self.cluster = cluster
        self.skipped_in_a_row = 0
        """Optimiser steps skipped since the last that was taken; part of a checkpoint."""
        self.cluster.forget()
        hollow = Hollow(policy.module.lm) if cluster.backend.shares_out else None
        self.model: nn.Module
        self.stepper: Stepper
        self.model, self.stepper = cluster.prepare(policy.module, build_optimizer(policy.module, recipe.optimizer))
        policy.share_out(cluster, hollow, self.stepper.take_over)

    @property
    def optimizer(self) -> Any:
        """The torch optimiser itself."""
        return self.stepper.optimizer

    def reset_optimizer(self) -> None:
        """Moments start anew."""
        self.stepper.forget()

    def run(
        self, samples: Sequence[Sample], *, step: int, passes: int, kl_lambda: float
    ) -> tuple[dict[str, float], Sequence[Sample]]:
        """Token statistics over all updates, and the mean of each loss term and gradient norm; {} without samples.

        Beside them the samples, completed by what the first update says of them where their proximal log-probs were
        not known.

        An update whose loss or gradient is not finite is skipped: it counts in `updates/skipped` alone. Raises
        TrainingError after too many in a row.
        """
        if not samples:
            return {}, samples
        factor = schedule_factor(self.recipe.optimizer, step, self.recipe.steps)
        for group in self.stepper.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.model.train()
        stats, totals, count, skipped = TokenStats(), dict[str, float](), 0, 0
        # Named by the step alone, so that a resumed run shuffles as this one does.
        rng = np.random.default_rng((self.recipe.seed, step, 2))
        for _ in range(passes):
            for minibatch in _minibatches(samples, self.recipe.batch.minibatches, rng):
                of_update, said = TokenStats(), dict[int, Tensor]()
                terms = self.accumulate(minibatch, of_update, kl_lambda=kl_lambda, said=said)
                # Each group on its own: a critic far from its target must not shrink the policy's step.
                norms = self.stepper.clip(self.recipe.optimizer.max_grad_norm)
                terms |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
                bad = [name for name, value in terms.items() if not np.isfinite(value)]
                if bad:
                    skipped += 1
                    self.stepper.skip()
                    self._skip(minibatch, bad, step=step, number=count + skipped)
                else:
                    self.stepper.step()
                    self.skipped_in_a_row = 0
                    stats = TokenStats.merge([stats, of_update])
                    totals = {name: totals.get(name, 0.0) + value for name, value in terms.items()}
                    count += 1
                if minibatch[0].proximal_logprobs is None:
                    samples = self._begun(samples, minibatch, said)
        stats = TokenStats.merge(self.cluster.gather(stats.sampled(), "the statistics of the update"))
        means = {name: total / count for name, total in totals.items()}
        return stats.metrics() | means | {"updates": count, "updates/skipped": skipped}, samples

    def accumulate(
        self,
        minibatch: Sequence[Sample],
        stats: TokenStats,
        *,
        kl_lambda: float,
        said: dict[int, Tensor] | None = None,
    ) -> dict[str, float]:
        """The gradient of one optimiser step, in as many micro-batches and on as many ranks as it takes.

        Returns the terms of the loss, summed over all of them. `said` is filled with this rank's log-probs of samples
        whose proximal ones are not known: the policy is still what it was as the step began.
        """
        first = minibatch[0].proximal_logprobs is None
        denominator = self.objective.denominator(minibatch)
        together = shared_prompts([sample.rollout for sample in minibatch], self.cluster.world_size)
        costs = [cost([minibatch[i].rollout for i in indices]) for indices in together]
        share = [i for indices in self.cluster.share(together, costs) for i in indices]
        # A rank without samples, or with fewer micro-batches where all have to make as many, goes through the motions
        # at weight 0, or the others would wait for its gradients.
        own = bool(share)
        share = share or [0]
        rollouts = [minibatch[i].rollout for i in share]
        groups = self.policy.microbatches(rollouts, self.recipe.batch.tokens_per_microbatch)
        rounds = self.cluster.most(len(groups), "the size of the update")
        terms: dict[str, float] = {}
        for number in range(rounds):
            weight = 1.0 if own and number < len(groups) else 0.0
            indices = groups[number % len(groups)]
            chosen = [minibatch[share[i]] for i in indices]
            of_chosen = [rollouts[i] for i in indices]
            multimodal, packed = self.policy.multimodal(of_chosen), self.policy.packed(of_chosen)
            batch = collate(chosen, self.policy.device, multimodal, packed)
            with self.cluster.accumulate(self.model, last=number == rounds - 1):
                policy, divergences = self._forward(batch)
                if first:
                    batch = begun_by(batch, policy.logprobs.detach())
                inputs = LossInputs(batch, policy.logprobs, policy.entropy, policy.values, **divergences)
                output = self.objective(inputs, kl_lambda=kl_lambda, denominator=denominator)
                self.cluster.backward(output.loss * weight)
                # Inside, since on a GPU it is here that a rank waits for gradients.
                for name, term in output.terms.items():
                    terms[f"loss/{name}"] = terms.get(f"loss/{name}", 0.0) + weight * term.item()
            if weight:
                stats.add(output.tokens)
            if weight and first and said is not None:
                lengths = [minibatch[share[i]].num_tokens for i in indices]
                rows = batch.proximal_logprobs[batch.response_mask].cpu().split(lengths)
                said |= {share[i]: row.clone() for i, row in zip(indices, rows, strict=True)}
        return {name: sum(values) for name, values in _transposed(self.cluster.gather(terms, "the terms of the loss"))}

    def _forward(self, batch: Batch) -> tuple[PolicyOutput, dict[str, Tensor]]:
        """What the policy says, and its exact KL to the anchors where it is in use."""
        anchors = self._anchor_states(batch)
        output: PolicyOutput = self.model(
            batch.input_ids,
            batch.response_mask,
            self.policy.temperature,
            tuple(anchors.values()),
            multimodal=batch.multimodal,
            packed=batch.packed,
        )
        return output, {f"kl_{name}": kl for name, kl in zip(anchors, output.divergences, strict=True)}

    def _begun(self, samples: Sequence[Sample], minibatch: Sequence[Sample], said: dict[int, Tensor]) -> list[Sample]:
        """The samples with what all ranks have found of them as the step began. `minibatch`: all of them, shuffled."""
        of_ranks = self.cluster.gather(said, "the proximal log-probs")
        found = {minibatch[index]: row for of_rank in of_ranks for index, row in of_rank.items()}

        def begun(sample: Sample) -> Sample:
            rollout, logprobs = sample.rollout, found[sample]
            if sample.policy_lag == 0:
                rollout = replace(rollout, behaviour_logprobs=logprobs)
            return replace(sample, rollout=rollout, proximal_logprobs=logprobs)

        return [begun(sample) for sample in samples]

    def _anchor_states(self, batch: Batch) -> dict[str, AnchorStates]:
        """For the exact KL alone: its distributions are too large to be stored with the rollouts."""
        kl = self.recipe.kl
        if kl.weight == 0 or kl.estimator != "full":
            return {}
        anchors = {"reference": self.policy.reference}
        if kl.uses_precedent:
            anchors["precedent"] = self.policy.precedent
        return {
            name: self.policy.anchor_states(batch, anchor) for name, anchor in anchors.items() if anchor is not None
        }

    def _skip(self, minibatch: Sequence[Sample], bad: Sequence[str], *, step: int, number: int) -> None:
        """Leaves the weights as they are and the batch on disk for whoever looks into it."""
        self.skipped_in_a_row += 1
        folder = Path(self.recipe.run_dir) / "skipped"
        dump = folder / f"step={step:06d}-update={number:03d}.safetensors"
        last = self.skipped_in_a_row > self.recipe.faults.skipped_updates
        if self.cluster.is_main and (last or len(list(folder.glob("*"))) < MOST_DUMPS):
            folder.mkdir(parents=True, exist_ok=True)
            batch = collate(minibatch, torch.device("cpu"))
            known = {field.name: getattr(batch, field.name) for field in fields(batch)}
            tensors = {name: value for name, value in known.items() if isinstance(value, torch.Tensor)}
            seeds = torch.tensor([sample.rollout.seed for sample in minibatch])
            save_tensors(dump.with_suffix(".tmp"), {"batch": tensors | {"seed": seeds}})
            dump.with_suffix(".tmp").replace(dump)
        if last:
            raise TrainingError(
                f"step {step}: {', '.join(bad)} is not finite in {self.skipped_in_a_row} updates in a row, none of "
                f"which was applied (faults.skipped_updates {self.recipe.faults.skipped_updates}). Look at the batch "
                f"in {dump}; lower optimizer.lr or optimizer.max_grad_norm, or try model.dtype: float32. "
                "--resume goes on from the last checkpoint"
            )


def build_optimizer(module: ActorCritic, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; the critic has a learning rate of its own."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n.startswith("lm.")], "name": "policy", "peak_lr": config.lr},
        {"params": [p for n, p in trained if not n.startswith("lm.")], "name": "critic", "peak_lr": config.critic_lr},
    ]
    return torch.optim.AdamW(
        [group | {"lr": group["peak_lr"]} for group in groups if group["params"]],
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def schedule_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by at a training step: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return 1.0 - progress
    if config.schedule == "cosine":
        return float(0.5 * (1.0 + np.cos(np.pi * progress)))
    return 1.0


def _minibatches(samples: Sequence[Sample], count: int, rng: np.random.Generator) -> Iterator[list[Sample]]:
    """In random order; the responses to a prompt stay together, or it would have to be computed in each of them."""
    count = min(count, len(samples))
    together = shared_prompts([sample.rollout for sample in samples], count)
    order = rng.permutation(len(together))
    for part in np.array_split(order, count):
        yield [samples[i] for number in part for i in together[number]]


def _transposed(dicts: Sequence[dict[str, float]]) -> Iterator[tuple[str, list[float]]]:
    return ((name, [values[name] for values in dicts]) for name in dicts[0])
