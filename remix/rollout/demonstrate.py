"""Rollouts that nobody sampled: each prompt's own solution, to be imitated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from remix.rollout.sample import Sampler, Scorer, Watch, unwatched
from remix.types import Engine, Prompt, Rollout, RolloutGroup, Sampling, Score


class Demonstrations(Sampler):
    """Answers training prompts with their solutions. The engine beside it is for evaluation."""

    def __init__(
        self,
        engine: Engine,
        rewards: Scorer,
        decode: Callable[[list[int]], str],
        run_seed: int,
        *,
        encode: Callable[[str], list[int]],
        eos_token_id: int,
    ) -> None:
        """`encode` turns text into token ids, no special tokens added."""
        super().__init__(engine, rewards, decode, run_seed)
        self.encode = encode
        self.eos_token_id = eos_token_id

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, group_size: int, *, version: int, watch: Watch = unwatched
    ) -> list[RolloutGroup]:
        """One group of one to each prompt, its solution cut at `sampling.max_tokens`."""
        with watch("sampling"):
            return [RolloutGroup(prompt, (self._demonstrate(prompt, sampling, version),)) for prompt in prompts]

    def _demonstrate(self, prompt: Prompt, sampling: Sampling, version: int) -> Rollout:
        text = prompt.solution or prompt.answer
        ids = [*self.encode(text), self.eos_token_id]
        whole = len(ids) <= sampling.max_tokens
        response_ids = torch.tensor(ids[: sampling.max_tokens])
        return Rollout(
            prompt_ids=torch.tensor(prompt.token_ids),
            response_ids=response_ids,
            sampler_logprobs=torch.zeros(len(response_ids)),  # a demonstrator draws nothing: log 1
            policy_version=version,
            finish_reason="stop" if whole else "length",
            seed=0,
            text=text,
            score=Score(1.0, "correct"),
            images=prompt.images,
        )
