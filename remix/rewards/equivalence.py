"""Is the answer in a response mathematically equal to a gold answer? Text in, verdict out.

    1. what counts as the answer    `boxed_answer`, else what math-verify finds at the end of the response
    2. equal as text or as numbers  `quick_grade`: cheap and always safe
    3. equal as mathematics         `grade`: math-verify, which may loop or eat memory, so run it in a killable process

Lengths are capped before anything is parsed, and parsed objects are never printed: writing out 9^{9^9} never ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Only for the types: workers import this module, and `remix.types` brings torch along.
    from remix.types import Verdict

ANSWER_LIMIT = 2_000
"""Characters of an answer that are parsed; a longer one counts only where it is the gold text itself."""
TAIL_LIMIT = 2_000
"""Characters at the end of a response in which an answer without a box is looked for."""

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"(?:[\s$,;]|\\[()\[\],;! ]|\\q?quad|\band\b|\bor\b)*")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+")


@dataclass(frozen=True, slots=True)
class Grade:
    """What the grader says of one response."""

    verdict: Verdict
    extracted: str | None = None
    """The answer found, as text; None if there is none or the grader failed."""


def grade(golds: Sequence[str], response: str) -> Grade:
    """Correct if the answer equals any of the golds.

    Unbounded in time and memory, and raises where math-verify does: only a worker calls it.
    """
    decided = quick_grade(golds, response)
    if decided is not None:
        return decided
    answer = boxed_answer(response)
    parsed = _parse(relevant(response))
    if answer is None:
        answer = next((item for item in parsed if isinstance(item, str)), None)
    if not parsed:
        return Grade("no_answer" if answer is None else "wrong", answer)
    failure = None
    for gold in golds:
        try:
            if len(gold) <= ANSWER_LIMIT and _equal(_parse(_boxed(gold)), parsed):
                return Grade("correct", answer)
        except Exception as error:  # sympy on whatever the model wrote; another gold may still match
            failure = error
    if failure is not None:
        raise failure
    return Grade("wrong", answer)


def quick_grade(golds: Sequence[str], response: str) -> Grade | None:
    """The grade where text or plain numbers decide it; None where it takes mathematics."""
    if not response.strip():
        return Grade("no_answer")
    answer = boxed_answer(response)
    if answer is None:
        return None
    if not answer:
        return Grade("no_answer")
    plain = _plain(answer)
    plain_golds = [_plain(gold) for gold in golds]
    if plain in plain_golds:
        return Grade("correct", answer)
    if len(answer) > ANSWER_LIMIT:
        return Grade("wrong", answer[:ANSWER_LIMIT])
    number, gold_numbers = _number(plain), [_number(gold) for gold in plain_golds]
    if number is not None:
        if number in gold_numbers:
            return Grade("correct", answer)
        # Two unequal decimals may still agree to the digits that are written, which is for math-verify to say.
        if _is_integer(number) and all(gold is not None and _is_integer(gold) for gold in gold_numbers):
            return Grade("wrong", answer)
    return None


def relevant(response: str) -> str:
    """All that `grade` looks at, short enough to be sent to a worker: grade(golds, relevant(r)) == grade(golds, r)."""
    answer = boxed_answer(response)
    return response[-TAIL_LIMIT:] if answer is None else _boxed(answer)


def boxed_answer(response: str) -> str | None:
    r"""What the last \boxed{} holds; boxes in a row, as in "\boxed{1} and \boxed{2}", together. None without a box."""
    open_braces: list[re.Match[str]] = []
    boxes: list[tuple[int, int, str]] = []  # start, end and content of those closed so far, the outermost only
    for token in _BOX_OR_BRACE.finditer(response):
        if token.group().endswith("{") and token.group() != r"\{":
            open_braces.append(token)
        elif token.group() == "}" and open_braces:
            opening = open_braces.pop()
            if opening.group() != "{":
                while boxes and boxes[-1][0] > opening.start():
                    boxes.pop()
                boxes.append((opening.start(), token.end(), response[opening.end() : token.start()].strip()))
    row: list[str] = []
    for position, (_, end, content) in reversed(list(enumerate(boxes))):
        if row and not _BETWEEN_BOXES.fullmatch(response, end, boxes[position + 1][0]):
            break
        row.append(content)
    return ", ".join(dict.fromkeys(reversed(row))) if row else None


def _plain(answer: str) -> str:
    """Without whitespace, dollar signs around it and the full stop after it."""
    return re.sub(r"\s+|\\[!,;: ]", "", answer).strip("$").removesuffix(".")


def _number(plain: str) -> Decimal | None:
    """The number that a short plain numeral means; exact, since 0.1 is a decimal and not a binary fraction."""
    return Decimal(plain.replace(",", "")) if len(plain) <= 100 and _NUMBER.fullmatch(plain) else None


def _is_integer(number: Decimal) -> bool:
    return number == number.to_integral_value()


def _boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


def _parse(text: str) -> list[Any]:
    """What math-verify reads in a text: the parsed expression, then the text it stands for; empty if nothing."""
    import math_verify

    # Its time-outs are alarm signals, which do not work in threads; the process that runs this has a deadline instead.
    parsed: list[Any] = math_verify.parse(text, _extraction(), parsing_timeout=None, raise_on_error=True)
    return parsed


def _extraction() -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    import math_verify

    return bool(math_verify.verify(gold, answer, timeout_seconds=None, raise_on_error=True))
