"""What every reward is: something that scores many responses at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from remix.types import Prompt, Verdict


@dataclass(frozen=True, slots=True)
class Part:
    """What one reward says of one response."""

    value: float
    verdict: Verdict | None = None
    """Whether the answer is right; None from rewards that do not look at the answer."""


class Reward(Protocol):
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        """One part per response, in order; the three sequences run in parallel."""

    def close(self) -> None:
        """Give back processes."""
