"""From prompts to groups of rollouts, by any engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from remix.types import Engine, Prompt, Request, Rollout, RolloutGroup, Sampling, Score

Watch = Callable[[str], AbstractContextManager[None]]
"""Times a stage by name."""


def unwatched(stage: str) -> AbstractContextManager[None]:
    return nullcontext()


def rollout_seed(run_seed: int, prompt_id: str, step: int, sample_index: int) -> int:
    """A sampling seed in [0, 2^31) that names one rollout, so that it can be drawn again on its own."""
    name = f"{run_seed}/{prompt_id}/{step}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


class Scorer(Protocol):
    """Rewards, as the sampler needs them."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Score]: ...


class Sampler:
    """An engine, a tokenizer and the rewards, joined: prompts in, scored groups out."""

    def __init__(self, engine: Engine, rewards: Scorer, decode: Callable[[list[int]], str], run_seed: int) -> None:
        """`decode` turns token ids into text, special tokens left out."""
        self.engine = engine
        self.rewards = rewards
        self.decode = decode
        self.run_seed = run_seed

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
        """`group_size` scored responses to each prompt by policy `version`, in the order of the prompts.

        `step`: that they are for, where it is not `version`.
        """
        step = version if step is None else step
        requests = [
            Request(prompt.token_ids, rollout_seed(self.run_seed, prompt.id, step, index), prompt.images)
            for prompt in prompts
            for index in range(group_size)
        ]
        with watch("sampling"):
            completions = self.engine.generate(requests, sampling)
        texts = [self.decode(completion.response_ids.tolist()) for completion in completions]
        lengths = [len(completion.response_ids) for completion in completions]
        asked = [prompt for prompt in prompts for _ in range(group_size)]
        prompt_ids = [ids for prompt in prompts for ids in [torch.tensor(prompt.token_ids)] * group_size]
        with watch("scoring"):
            scores = self.rewards.score(asked, texts, lengths)
        rollouts = [
            Rollout(
                prompt_ids=ids,
                response_ids=completion.response_ids,
                sampler_logprobs=completion.sampler_logprobs,
                policy_version=version,
                finish_reason=completion.finish_reason,
                seed=request.seed,
                text=text,
                score=score,
                images=request.images,
            )
            for request, ids, completion, text, score in zip(
                requests, prompt_ids, completions, texts, scores, strict=True
            )
        ]
        return [
            RolloutGroup(prompt, tuple(rollouts[i * group_size : (i + 1) * group_size]))
            for i, prompt in enumerate(prompts)
        ]
