"""Rollouts that nobody sampled: each prompt's own solution, to be imitated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        group_size: int,
        *,
        version: int,
        step: int | None = None,
        watch: Watch = unwatched,
    ) -> list[RolloutGroup]:
        """One group of one to each prompt, its solution cut at `sampling.max_tokens`."""
        with watch("sampling"):
            return [RolloutGroup(prompt, (self._demonstrate(prompt, sampling, version),)) for prompt in prompts]

    def cut(self, prompts: Iterable[Prompt], max_tokens: int) -> str | None:
        """What to tell the user of solutions that are cut at `max_tokens`; None where all are whole."""
        lengths = [len(self._whole(prompt)) for prompt in prompts]
        long, longest = sum(length > max_tokens for length in lengths), max(lengths, default=0)
        if not long:
            return None
        return (
            f"{long:,} of {len(lengths):,} demonstrations are cut at rollout.max_tokens {max_tokens:,}, so that the "
            f"model does not learn how they end; the longest has {longest:,} tokens: set rollout.max_tokens to "
            f"{longest} to keep all of them whole"
        )

    def _whole(self, prompt: Prompt) -> list[int]:
        return [*self.encode(prompt.solution or prompt.answer), self.eos_token_id]

    def _demonstrate(self, prompt: Prompt, sampling: Sampling, version: int) -> Rollout:
        ids = self._whole(prompt)
        whole = len(ids) <= sampling.max_tokens
        response_ids = torch.tensor(ids[: sampling.max_tokens])
        return Rollout(
            prompt_ids=torch.tensor(prompt.token_ids),
            response_ids=response_ids,
            sampler_logprobs=torch.zeros(len(response_ids)),  # a demonstrator draws nothing: log 1
            policy_version=version,
            finish_reason="stop" if whole else "length",
            seed=0,
            text=prompt.solution or prompt.answer,
            score=Score(1.0, "correct"),
            images=prompt.images,
        )
