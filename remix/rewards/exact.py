"""The answer is the gold string, character by character."""

from __future__ import annotations

from collections.abc import Sequence

from remix.config import ExactMatchReward
from remix.rewards.base import Part
from remix.types import Prompt


class ExactMatch:
    def __init__(self, config: ExactMatchReward) -> None:
        self._after = config.after

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        return [self._one(prompt.answer, response) for prompt, response in zip(prompts, responses, strict=True)]

    def close(self) -> None:
        pass

    def _one(self, gold: str, response: str) -> Part:
        answer = response
        if self._after is not None:
            _, marker, answer = response.rpartition(self._after)
            if not marker:
                return Part(0.0, "no_answer")
        answer = answer.strip()
        if not answer:
            return Part(0.0, "no_answer")
        return Part(1.0, "correct") if answer == gold.strip() else Part(0.0, "wrong")
