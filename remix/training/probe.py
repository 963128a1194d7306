"""The proof that weights have reached the inference engine: both are asked for the same log-probs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from remix.config import Recipe
from remix.errors import TrainingError
from remix.models.policy import Policy
from remix.types import Engine, Prompt, Request, Rollout, Sampling

PROBE_TOKENS = 16
DEFAULT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean |difference| in nats. In bfloat16 kernels differ by about 1e-2; weights of another model by whole nats."""


def check_sync(recipe: Recipe, policy: Policy, engine: Engine, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Raises TrainingError where engine and trainer are not the same policy. Returns the difference as a metric."""
    if recipe.rollout.engine.type == "hf":
        return {}  # it samples from the trainer's own module
    sampling = Sampling(max_tokens=PROBE_TOKENS, temperature=recipe.rollout.temperature)
    requests = [Request(prompt.token_ids, seed) for seed, prompt in enumerate(prompts)]
    rollouts = [
        Rollout(
            prompt_ids=torch.tensor(request.prompt_ids),
            response_ids=completion.response_ids,
            sampler_logprobs=completion.sampler_logprobs,
            policy_version=-1,
            finish_reason=completion.finish_reason,
            seed=request.seed,
            text="",
        )
        for request, completion in zip(requests, engine.generate(requests, sampling), strict=True)
    ]
    scores = policy.score(rollouts, tokens_per_microbatch=recipe.batch.tokens_per_microbatch)
    difference = torch.cat(
        [score.logprobs - rollout.sampler_logprobs for score, rollout in zip(scores, rollouts, strict=True)]
    )
    mean = difference.abs().mean().item()
    tolerance = recipe.rollout.probe_tolerance or DEFAULT_TOLERANCE[recipe.model.dtype]
    if not mean <= tolerance:
        raise TrainingError(
            f"after the weight sync the {recipe.rollout.engine.type} engine and the trainer differ by {mean:.3g} nats "
            f"a token on a probe (tolerance {tolerance:g}): the engine does not hold the trained weights, or computes "
            "them otherwise. Use rollout.engine.type: hf, or if the difference is rounding raise "
            "rollout.probe_tolerance"
        )
    return {"sampler/probe": mean}
