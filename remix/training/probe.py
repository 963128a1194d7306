"""The proof that weights have reached the inference engine: it and the trainer are asked for the same log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from remix.config import Recipe
from remix.errors import TrainingError, first_line
from remix.models.policy import Policy
from remix.types import Completion, Engine, Prompt, Request, Rollout, Sampling

PROBE_TOKENS = 16
DEFAULT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""Mean |difference| in nats. In bfloat16 kernels differ by about 1e-2; weights of another model by whole nats."""
DISTURBANCE = 1.0625
"""A factor on every weight that shows in every dtype, and drives no activation out of bounds."""

DISTURBANCE_OF_B = 2**-6
"""Added to a LoRA's B, beside the factor."""


class SyncProbe:
    """Asked after every sync. It remembers the engine's last answer and what the trainer said of it."""

    def __init__(self, recipe: Recipe, policy: Policy, any_rank: Callable[[bool], bool] = bool) -> None:
        """`any_rank`: whether something is so on any of the ranks, which sync together or not at all."""
        self.recipe = recipe
        self.policy = policy
        self._any_rank = any_rank
        self._answer: list[Rollout] | None = None
        self._scores: list[Tensor] = []

    def check(self, engine: Engine, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Raises TrainingError where engine and trainer are not the same policy. Returns the difference as a metric.

        `prompts` are the same at every call: the engine draws from them by the same seeds.
        """
        if self.recipe.rollout.engine.type == "hf":
            return {}  # it samples from the trainer's own module
        answer = self._ask(engine, prompts)
        scores = [
            score.logprobs
            for score in self.policy.score(answer, tokens_per_microbatch=self.recipe.batch.tokens_per_microbatch)
        ]
        # The trainer has moved on from the very tokens that the engine gives as ever. An update too small for the
        # engine's dtype looks like that too, so the weights are made to differ before the engine is accused.
        stands_still = self._answer is not None and _same(answer, self._answer)
        suspicious = self._any_rank(stands_still and not _equal(scores, self._scores))
        if suspicious and not self._takes_weights(engine, prompts, answer) and stands_still:
            raise TrainingError(
                f"the weight sync changed nothing in the {self.recipe.rollout.engine.type} engine: after the update "
                "it answers a probe bit for bit as before, though the trainer's log-probs have changed, so it does "
                "not hold the trained weights. Go on from the last checkpoint with rollout.engine.type: hf"
            )
        self._answer, self._scores = answer, scores
        return {"sampler/probe": self._difference(answer, scores)}

    def _difference(self, answer: Sequence[Rollout], scores: Sequence[Tensor]) -> float:
        mean = (torch.cat(list(scores)) - torch.cat([r.sampler_logprobs for r in answer])).abs().mean().item()
        recipe, tolerance = self.recipe, self._tolerance
        if not mean <= tolerance:
            raise TrainingError(
                f"after the weight sync the {recipe.rollout.engine.type} engine and the trainer differ by {mean:.3g} "
                f"nats a token on a probe (tolerance {tolerance:g}): the engine does not hold the trained weights, or "
                "computes them otherwise. Use rollout.engine.type: hf, or if the difference is rounding raise "
                "rollout.probe_tolerance"
            )
        return mean

    @property
    def _tolerance(self) -> float:
        return self.recipe.rollout.probe_tolerance or DEFAULT_TOLERANCE[self.recipe.model.dtype]

    def _takes_weights(self, engine: Engine, prompts: Sequence[Prompt], answer: Sequence[Rollout]) -> bool:
        """Other weights give another answer, and the policy's own then give this one again."""
        for _ in range(2):  # an engine that is started again amid the first has the policy's weights in place of these
            engine.sync(self._disturbed_weights())
            disturbed = not _same(self._ask(engine, prompts), answer)
            if not self._any_rank(not disturbed):
                break
        engine.sync(self._weights())
        return disturbed and _near(self._ask(engine, prompts), answer, self._tolerance)

    def _disturbed_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights():
            # Of a LoRA that has hardly begun B is so small that a factor of it would not show.
            added = DISTURBANCE_OF_B if ".lora_B." in name else 0.0
            yield name, tensor * DISTURBANCE + added if tensor.is_floating_point() else tensor

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.policy.engine_weights(self.recipe.rollout.engine)

    def _ask(self, engine: Engine, prompts: Sequence[Prompt]) -> list[Rollout]:
        sampling = Sampling(max_tokens=PROBE_TOKENS, temperature=self.recipe.rollout.temperature)
        requests = [Request(prompt.token_ids, seed, prompt.images) for seed, prompt in enumerate(prompts)]
        completions = engine.generate(requests, sampling)
        return [_as_rollout(*pair) for pair in zip(requests, completions, strict=True)]


def check_images(recipe: Recipe, policy: Policy, engine: Engine, prompt: Prompt) -> None:
    """Whether the trainer sees the image of a prompt as the model's own generation (`engine`) does.

    Raises ValueError before a run begins where a family's forward needs more than its processor gives.
    """
    kind = policy.module.lm.config.model_type
    refused = f"model {recipe.model.path}: a model of type {kind} reads images in a way that is not supported"
    remedy = "choose a model of another family, or another adapter.type"
    request = Request(prompt.token_ids, 0, prompt.images)
    try:
        (completion,) = engine.generate([request], Sampling(4, recipe.rollout.temperature))
        answer = _as_rollout(request, completion)
        (score,) = policy.score([answer], tokens_per_microbatch=recipe.batch.tokens_per_microbatch)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{refused} ({first_line(error)}); {remedy}") from error
    worst = (score.logprobs - completion.sampler_logprobs).abs().max().item()
    if not worst <= DEFAULT_TOLERANCE[recipe.model.dtype] * 4:
        raise ValueError(f"{refused} (log-probs differ by {worst:.2g} nats from its own generation's); {remedy}")


def _as_rollout(request: Request, completion: Completion) -> Rollout:
    return Rollout(
        prompt_ids=torch.tensor(request.prompt_ids),
        response_ids=completion.response_ids,
        sampler_logprobs=completion.sampler_logprobs,
        policy_version=-1,
        finish_reason=completion.finish_reason,
        seed=request.seed,
        text="",
        images=request.images,
    )


def _same(a: Sequence[Rollout], b: Sequence[Rollout]) -> bool:
    return _equal([r.response_ids for r in a], [r.response_ids for r in b]) and _equal(
        [r.sampler_logprobs for r in a], [r.sampler_logprobs for r in b]
    )


def _near(a: Sequence[Rollout], b: Sequence[Rollout], tolerance: float) -> bool:
    """But for rounding, where an engine's batches are not the same twice."""
    return _equal([r.response_ids for r in a], [r.response_ids for r in b]) and all(
        torch.allclose(x.sampler_logprobs, y.sampler_logprobs, rtol=0, atol=tolerance)
        for x, y in zip(a, b, strict=True)
    )


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
