"""The response has the asked-for form: the whole of it matches a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence

from remix.config import FormatReward
from remix.rewards.base import Part
from remix.types import Prompt


class Format:
    """The pattern is the user's own and runs without a deadline: one that backtracks without end stalls the run."""

    def __init__(self, config: FormatReward) -> None:
        try:
            self._pattern = re.compile(config.pattern)
        except re.error as error:
            raise ValueError(
                f"the format reward's pattern {config.pattern!r} is not a regular expression: {error}; "
                "braces and backslashes that stand for themselves are written \\{, \\} and \\\\"
            ) from error

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        return [Part(float(self._pattern.fullmatch(response) is not None)) for response in responses]

    def close(self) -> None:
        pass
