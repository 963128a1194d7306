"""Grading in processes that can be killed, each answer under its own wall-clock deadline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Self

from remix.rewards.answers.extract import extract
from remix.rewards.equivalence import Grade, gold_answer, quick_grade
from remix.rewards.workers import Lost, WorkerPool, WorkerSpec

MEMORY_BYTES = 2 * 1024**3
"""Address space of one worker."""


class GraderPool:
    """Up to `workers` grading processes, started when an answer needs them. Several threads may call it."""

    def __init__(self, workers: int = 2, timeout: float = 5.0, memory: int = MEMORY_BYTES) -> None:
        module = "remix.rewards.math_worker"
        arguments = str(memory), str(timeout + 1)
        by_hand = " ".join([sys.executable, "-m", module, *arguments])
        self._pool = WorkerPool(WorkerSpec(module, arguments, "a grader process", by_hand, timeout), workers)

    def grade(
        self, golds: Sequence[Sequence[str]], responses: Sequence[str], tolerance: float | None = None
    ) -> list[Grade]:
        """One grade per response, in order; each response comes with one or more gold answers.

        `tolerance`: the relative error that a benchmark allows numerical answers, such as 0.01.
        """
        answers = [extract(response) for response in responses]
        grades = [quick_grade(*pair) for pair in zip(golds, answers, strict=True)]
        hard = [index for index, found in enumerate(grades) if found is None]
        requests = [(list(map(gold_answer, golds[index])), str(answers[index]), tolerance) for index in hard]
        for index, reply in zip(hard, self._pool.map(requests), strict=True):
            grades[index] = Grade(reply.verdict) if isinstance(reply, Lost) else Grade(*reply)
        return [found for found in grades if found is not None]

    def close(self) -> None:
        """End the workers. A later call starts new ones."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
