"""All rewards of a recipe together: responses in, scores out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from remix.config import RewardConfig
from remix.rewards.base import Part, Reward
from remix.rewards.exact import ExactMatch
from remix.rewards.format import Format
from remix.rewards.length import Length
from remix.rewards.math import Math
from remix.rewards.python import Python
from remix.types import Prompt, Score

REWARDS: dict[str, Callable[[Any], Reward]] = {
    "exact_match": ExactMatch,
    "math": Math,
    "format": Format,
    "length": Length,
    "python": Python,
}
"""By `type:`. A new reward is a class in a file of its own and a row here."""


LARGEST = 3.4e38
"""A reward beyond it is infinite in the float32 of training."""


class RewardSuite:
    """The rewards of a recipe, each under a name of its own: its type, numbered from the second of a type on.

    The verdict is that of the first reward that checks the answer (exact_match, math). Without one, an answer counts
    as correct where the first python reward is 1 or more; without that too, where the weighted sum is above 0.
    Where a reward fails, the verdict is that failure, whatever the others say.
    """

    def __init__(self, configs: Sequence[RewardConfig]) -> None:
        self._rewards: dict[str, Reward] = {}
        self._weights: dict[str, float] = {}
        try:
            for config in configs:
                name = _unused(config.type, self._rewards)
                self._rewards[name] = REWARDS[config.type](config)
                self._weights[name] = config.weight
        except BaseException:
            self.close()  # the rewards before it may have processes
            raise
        self._function = next((name for name, reward in self._rewards.items() if isinstance(reward, Python)), None)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Score]:
        """One score per response, in order; `num_tokens` counts the response's tokens."""
        if not len(prompts) == len(responses) == len(num_tokens):
            raise ValueError(
                f"{len(prompts)} prompts, {len(responses)} responses and {len(num_tokens)} token counts: "
                "give one of each per response, repeating the prompt of a group"
            )
        columns = {name: reward.score(prompts, responses, num_tokens) for name, reward in self._rewards.items()}
        return [self._combine({name: column[row] for name, column in columns.items()}) for row in range(len(prompts))]

    def close(self) -> None:
        """Give back the processes of all rewards."""
        for reward in self._rewards.values():
            reward.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _combine(self, parts: dict[str, Part]) -> Score:
        value = sum(self._weights[name] * part.value for name, part in parts.items())
        values = {name: part.value for name, part in parts.items()}
        failed = next((part for part in parts.values() if part.verdict in ("timeout", "error")), None)
        if failed is not None and failed.verdict is not None:
            return Score(value, failed.verdict, values, failed.note)
        if abs(value) > LARGEST:
            return Score(0.0, "error", values, f"the weighted sum of the rewards is {value:g}, beyond single precision")
        verdict = next((part.verdict for part in parts.values() if part.verdict is not None), None)
        if verdict is None:
            right = parts[self._function].value >= 1 if self._function else value > 0
            verdict = "correct" if right else "wrong"
        return Score(value, verdict, values)


def _unused(name: str, taken: dict[str, Reward]) -> str:
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name}_{number}"
    return unused
