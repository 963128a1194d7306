"""Is the answer in a response mathematically equal to a gold answer? Text in, verdict out.

    1. what counts as the answer   `answers.extract`
    2. equal as text or a number   `quick_grade`: cheap and always safe, done by whoever asks
    3. equal as mathematics        `judge`: our own parser first; math-verify for what that does not read, sums and
                                   integrals, which may loop or eat memory: run it in a process that can be killed

Lengths are capped before anything is parsed, and parsed objects are never printed: writing out 9^{9^9} never ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remix.rewards.answers.extract import extract
from remix.rewards.answers.normalise import plain
from remix.rewards.answers.numerals import rational
from remix.types import Verdict

GRADER_NAME = "remix-math"
GRADER_VERSION = "1.1"
"""Changes whenever a verdict may: results of other versions are not comparable."""

ANSWER_LIMIT = 2_000
"""Characters of an answer that are parsed; a longer one counts only where it is the gold text itself."""
GOLD_ANSWER_LIMIT = 200
"""A longer gold is a whole solution, in which the answer is looked for as in a response."""


@dataclass(frozen=True, slots=True)
class Grade:
    """What the grader says of one response."""

    verdict: Verdict
    extracted: str | None = None
    """The answer found, as text; None if there is none or the grader failed."""


def grade(golds: Sequence[str], response: str, tolerance: float | None = None) -> Grade:
    """Correct if the answer equals any of the golds, to a relative error of `tolerance` where one is given.

    Unbounded in time and memory, and raises where computer algebra does: only a worker calls it.
    """
    answer = extract(response)
    decided = quick_grade(golds, answer)
    return decided if decided is not None else judge(golds, str(answer), tolerance)


def quick_grade(golds: Sequence[str], answer: str | None) -> Grade | None:
    """The grade where text or plain numbers decide it; None where it takes mathematics."""
    if answer is None or not answer.strip():
        return Grade("no_answer")
    text = plain(answer)
    plain_golds = [plain(gold) for gold in golds]
    if text in plain_golds:
        return Grade("correct", answer[:ANSWER_LIMIT])
    if len(answer) > ANSWER_LIMIT:
        return Grade("wrong", answer[:ANSWER_LIMIT])
    number = rational(text)
    if number is not None and any(number == rational(gold) for gold in plain_golds):
        return Grade("correct", answer)
    # Unequal integers are decided; decimals may be rounded, and 1,234 may be two numbers.
    if text.lstrip("-").isdecimal() and all(gold.lstrip("-").isdecimal() for gold in plain_golds):
        return Grade("wrong", answer)
    return None


def judge(golds: Sequence[str], answer: str, tolerance: float | None = None) -> Grade:
    """The grade of an extracted answer, as mathematics."""
    from remix.rewards.answers.judge import same_answer

    failure = None
    for gold in map(gold_answer, golds):
        if len(gold) > ANSWER_LIMIT:
            continue
        same = same_answer(gold, answer, tolerance)
        if same is None:
            try:
                same = _computer_algebra(gold, answer)
            except Exception as error:  # sympy on whatever the model wrote; another gold may still match
                failure = error
        if same:
            return Grade("correct", answer)
    if failure is not None:
        raise failure
    return Grade("wrong", answer)


def gold_answer(gold: str) -> str:
    """The answer of a gold that is given in a box, in "answer" tags, behind ####, or as a whole solution."""
    if any(mark in gold for mark in (r"\boxed", "<answer>", "####")) or len(gold) > GOLD_ANSWER_LIMIT:
        return extract(gold) or gold
    return gold


def warm_up() -> None:
    """Import what judging takes and build its tables, which takes longer than any answer."""
    judge([r"\sum_{k=1}^{2} k"], "3")


def _computer_algebra(gold: str, answer: str) -> bool:
    import math_verify

    # Its time-outs are alarm signals, which do not work in threads; the process that runs this has a deadline instead.
    parsed = [
        math_verify.parse(rf"\boxed{{{text}}}", _extraction(), parsing_timeout=None, raise_on_error=True)
        for text in (gold, answer)
    ]
    return all(parsed) and bool(math_verify.verify(*parsed, timeout_seconds=None, raise_on_error=True))


def _extraction() -> list[Any]:
    from math_verify import LatexExtractionConfig

    return [LatexExtractionConfig(boxed_match_priority=0)]
