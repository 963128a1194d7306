"""Overlong responses cost: DAPO's soft penalty on the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from remix.algorithms import overlong_penalty
from remix.config import LengthReward
from remix.rewards.base import Part
from remix.types import Prompt


class Length:
    def __init__(self, config: LengthReward) -> None:
        self._max_tokens = config.max_tokens
        self._buffer = config.max_tokens - config.free_tokens

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        return [Part(overlong_penalty(count, self._max_tokens, self._buffer)) for count in num_tokens]

    def close(self) -> None:
        pass
