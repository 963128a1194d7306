"""What every reward is: something that scores many responses at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from remix.terminal import printable
from remix.types import Prompt, Verdict


@dataclass(frozen=True, slots=True)
class Part:
    """What one reward says of one response."""

    value: float
    """Finite, and 0 where the reward failed."""
    verdict: Verdict | None = None
    """Whether the answer is right; None from rewards that do not look at the answer and did not fail."""
    note: str = ""
    """Why the reward failed."""


class Reward(Protocol):
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        """One part per response, in order; the three sequences run in parallel."""

    def close(self) -> None:
        """Give back processes."""


def shortened(text: str, limit: int = 300) -> str:
    """Foreign text for a note: one line of at most so many characters, all of which can be printed."""
    line = "".join(char if char.isprintable() else " " for char in printable(text[: 2 * limit])[: limit + 1])
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
