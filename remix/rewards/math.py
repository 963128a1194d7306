"""The answer is mathematically equal to the gold answer. The one grader: training and benchmarks both call it."""

from __future__ import annotations

from collections.abc import Sequence

from remix.config import MathReward
from remix.rewards.base import Part
from remix.rewards.pool import GraderPool
from remix.types import Prompt


class Math:
    def __init__(self, config: MathReward) -> None:
        self._pool = GraderPool(workers=config.workers, timeout=config.timeout)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        grades = self._pool.grade([(prompt.answer,) for prompt in prompts], responses)
        return [Part(float(grade.verdict == "correct"), grade.verdict) for grade in grades]

    def close(self) -> None:
        self._pool.close()
