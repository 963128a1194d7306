"""Two texts: the same answer, not the same, or not for this grader to say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from remix.rewards.answers.compare import Comparison
from remix.rewards.answers.nodes import Node, UnreadableError, symbols
from remix.rewards.answers.normalise import clean, moduli, without_spaces, without_thousands, words
from remix.rewards.answers.parse import parse

_BEYOND = re.compile(
    r"\\(?:sum|prod|int|iint|oint|lim|begin|frac\{d(?=[\s}^])|partial|bigcap|max|min|sup|inf)(?![A-Za-z])"
)
"""Mathematics that the parser does not read and computer algebra may."""
_CHOICE = re.compile(
    r"(?:\\text\s?\{)?\s?\(?([A-J])[).:]\s?\}?\s?[.:]?\s?"
    r"(?P<rest>(?!\s*(?:[-+*/^=_<>:;}]|,|and\b|or\b|&|\\text\{\s?(?:and|or)\b)).*\S.*)"
)
_NOTHING = re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?|empty set|none exist")
_DECIMAL_COMMA = re.compile(r"(-?\d+),(\d+)")


def same_answer(gold: str, answer: str, tolerance: float | None = None) -> bool | None:
    """None where either text is mathematics beyond this grader."""
    try:
        return _same_answer(gold, answer, tolerance)
    except RecursionError:  # some thousand operations in a row
        return False


def _same_answer(gold: str, answer: str, tolerance: float | None) -> bool | None:
    wanted, got = clean(gold), clean(answer)
    if not got:
        return False
    if len({modulus for modulus in (moduli(gold), moduli(answer)) if modulus}) > 1:
        return False
    if _spelling(wanted) == _spelling(got):
        return True
    golds, answers = list(_readings(wanted)), list(_readings(got))
    comparison = Comparison(tolerance)
    if golds and answers:
        if any(comparison.equal(a, b) or comparison.letter_units(a, b) for a in golds for b in answers):
            return True
        if _decimal_comma(golds, got) or _choice(wanted, golds, got, comparison):
            return True
        return bool(_words_agree(wanted, got))
    if _words_agree(wanted, got) or _choice(wanted, golds, got, comparison):
        return True
    return None if _BEYOND.search(wanted) or _BEYOND.search(got) else False


def _spelling(text: str) -> str:
    return without_spaces(re.sub(r"\\text|[{}]", " ", text))


def _readings(text: str) -> Iterator[Node]:
    """What a text may mean: 1,234 is a number and a list of two; 2e-3 is 0.002 and 2e - 3."""
    if _NOTHING.fullmatch(words(text)):
        yield Node("set")
        return
    seen = set()
    for reading in (without_thousands(text), text, re.sub(r"(?<=\d)e-(?=\d)", " e - ", text)):
        if reading not in seen:
            seen.add(reading)
            try:
                yield parse(reading)
            except UnreadableError:
                continue


def _words_agree(wanted: str, got: str) -> bool:
    """Texts that are words rather than mathematics, apart from case, articles and punctuation."""
    if not re.search(r"[A-Za-z]{3}", re.sub(r"\\(?!text)[A-Za-z]+", "", wanted)) or re.search(
        r"[\^=<>+*/]|\\frac", wanted + got
    ):
        return False
    return words(wanted) == words(got) != ""


def _choice(wanted: str, golds: list[Node], got: str, comparison: Comparison) -> bool:
    """(C) 12 answers both "which" and "how many"."""
    match = _CHOICE.fullmatch(got)
    if match is None:
        return False
    if words(wanted) in "abcdefghij" and len(words(wanted)) == 1:
        return words(wanted) == match.group(1).lower()
    return any(comparison.equal(gold, rest) for gold in golds for rest in _readings(match["rest"].strip(" }")))


def _decimal_comma(golds: list[Node], got: str) -> bool:
    """1000,99 for a gold of 1000.99, where the point of the gold says that it is one number."""
    match = _DECIMAL_COMMA.fullmatch(got)
    if match is None or any(symbols(gold) for gold in golds):
        return False
    return any(gold.op == "dec" and Comparison().equal(gold, parse(f"{match[1]}.{match[2]}")) for gold in golds)
