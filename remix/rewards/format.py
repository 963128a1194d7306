"""The response has the asked-for form: the whole of it matches a regular expression."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from remix.config import FormatReward
from remix.rewards.base import Part, shortened
from remix.types import Prompt


class Format:
    """The pattern is the user's own and may backtrack without end, hence the deadline, which `re` does not have."""

    def __init__(self, config: FormatReward) -> None:
        self._timeout = config.timeout
        try:
            self._pattern = regex.compile(config.pattern)
        except regex.error as error:
            raise ValueError(
                f"the format reward's pattern {config.pattern!r} is not a regular expression: {error}; "
                "braces and backslashes that stand for themselves are written \\{, \\} and \\\\"
            ) from error

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], num_tokens: Sequence[int]) -> list[Part]:
        return [self._part(*pair) for pair in zip(prompts, responses, strict=True)]

    def close(self) -> None:
        pass

    def _part(self, prompt: Prompt, response: str) -> Part:
        try:
            return Part(float(self._pattern.fullmatch(response, timeout=self._timeout) is not None))
        except TimeoutError:
            note = (
                f"the format reward's pattern {shortened(self._pattern.pattern)} took more than {self._timeout:g} s on "
                f"a response of {len(response):,} characters to prompt '{shortened(prompt.id)}'"
            )
            return Part(0.0, "timeout", note)
