"""The answer is the gold string, character by character or word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence

from remix.config import ExactMatchReward
from remix.rewards.base import Part
from remix.rewards.equivalence import Grade
from remix.types import Prompt

_WORD = re.compile(r"-?\w+(?:[.:/]\w+)*")


def plain_words(text: str) -> str:
    """The words and numbers, in lower case, a space between them; text without any stays as it is."""
    return " ".join(_WORD.findall(text.casefold())) or text.strip()


def exact_grade(golds: Sequence[str], response: str, after: str | None, normalize: bool = False) -> Grade:
    """The answer is what follows the last `after`, or the whole response, but for white space around it."""
    _, marker, rest = response.rpartition(after) if after is not None else ("", "whole", response)
    answer = rest.strip()
    if not marker or not answer:
        return Grade("no_answer")
    form = plain_words if normalize else str.strip
    return Grade("correct" if any(form(answer) == form(gold) for gold in golds) else "wrong", answer)


class ExactMatch:
    def __init__(self, config: ExactMatchReward) -> None:
        self._after = config.after
        self._normalize = config.normalize

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        grades = [
            exact_grade((prompt.answer,), response, self._after, self._normalize)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return [Part(float(grade.verdict == "correct"), grade.verdict) for grade in grades]

    def close(self) -> None:
        pass
