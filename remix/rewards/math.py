"""The answer is mathematically equal to the gold answer. The one grader: training and benchmarks both call it."""

from __future__ import annotations

from collections.abc import Sequence

from remix.config import MathReward
from remix.rewards.base import Part, shortened
from remix.rewards.equivalence import Grade
from remix.rewards.pool import GraderPool
from remix.types import Prompt


class Math:
    def __init__(self, config: MathReward) -> None:
        self._timeout = config.timeout
        self._pool = GraderPool(workers=config.workers, timeout=config.timeout)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        grades = self._pool.grade([(prompt.answer,) for prompt in prompts], responses)
        return [
            Part(float(grade.verdict == "correct"), grade.verdict, self._note(prompt, grade))
            for prompt, grade in zip(prompts, grades, strict=True)
        ]

    def close(self) -> None:
        self._pool.close()

    def _note(self, prompt: Prompt, grade: Grade) -> str:
        troubles = {"timeout": f"did not finish within {self._timeout:g} s", "error": "failed"}
        trouble = troubles.get(grade.verdict)
        return f"the math grader {trouble} on prompt '{shortened(prompt.id)}'" if trouble else ""
