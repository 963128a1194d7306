"""The answer is the gold string, character by character."""

from __future__ import annotations

from collections.abc import Sequence

from remix.config import ExactMatchReward
from remix.rewards.base import Part
from remix.rewards.equivalence import Grade
from remix.types import Prompt


def exact_grade(golds: Sequence[str], response: str, after: str | None) -> Grade:
    """The answer is what follows the last `after`, or the whole response, but for white space around it."""
    _, marker, rest = response.rpartition(after) if after is not None else ("", "whole", response)
    answer = rest.strip()
    if not marker or not answer:
        return Grade("no_answer")
    return Grade("correct" if any(answer == gold.strip() for gold in golds) else "wrong", answer)


class ExactMatch:
    def __init__(self, config: ExactMatchReward) -> None:
        self._after = config.after

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        grades = [
            exact_grade((prompt.answer,), response, self._after)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return [Part(float(grade.verdict == "correct"), grade.verdict) for grade in grades]

    def close(self) -> None:
        pass
