"""Numbers as they are written. Each becomes an exact fraction or nothing; none is ever written out again."""

from __future__ import annotations

import re
from fractions import Fraction

LARGEST_EXPONENT = 5_000
"""Of ten, in scientific notation; larger ones are left to be compared as text."""

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASE_WORDS |= {"eleven": 11, "twelve": 12, "thirteen": 13, "sixteen": 16}
_BASE_NAME = r"(?:\d{1,2}|" + "|".join(_BASE_WORDS) + ")"
_BASED = re.compile(
    r"(?<![A-Za-z\d_.\\}])(?P<open>\()?(?P<digits>\d[\dA-Z]{0,60}(?:\.[\dA-Z]{1,60})?)(?(open)\))\s?"
    rf"(?:_\s?(?:\{{\s?(?:\\text\s?\{{\s?)?\(?(?P<braced>{_BASE_NAME})\)?\s?\}}?\s?\}}"
    rf"|\\text\s?\{{(?P<text>{_BASE_NAME})\}}|(?P<bare>{_BASE_NAME}))(?!\d)"
    rf"|\s?\(?\s?(?:\\text\s?\{{\s?)?\(?\s?(?:in )?base[- ]?(?P<said>{_BASE_NAME})\b\s?\)?\s?\}}?\)?)"
)
_REPEATING = re.compile(
    r"(?<![\w.])(?P<whole>\d{0,20})\.(?P<fixed>\d{0,20})"
    r"(?:\\(?:overline|bar|overbar)\s?(?:\{(?P<line>[\d\s]{1,20})\}|(?P<digit>\d))"
    r"|(?P<dots>\\dot\s?\{?\d\}?(?:\d{0,20}\\dot\s?\{?\d\}?)?)"
    r"|\((?P<paren>\d{1,20})\)"
    r"|(?P<tail>)\s?(?:\.\.\.|\\[lc]?dots|…))"
    r"(?P<more>\s?(?:\.\.\.|\\[lc]?dots|…))?"
)
_SCIENTIFIC = re.compile(
    r"(?P<mantissa>[-+]?(?:\d{1,60}(?:\.\d{0,60})?|\.\d{1,60}))?\s?"
    r"(?:[eE](?P<e>[-+]?\d{1,6})|(?:(?(mantissa)(?:\*|\\times|\\cdot)\s?))10\^\s?(?:\{\s?(?P<braced>[-+]?\d{1,6})\s?\}|(?P<bare>-?\d{1,6})))"
)
_PLAIN = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[-+]?\.\d+")
_FRACTION = re.compile(
    r"(?P<sign>[-+])?(?:\\frac\{(?P<a>-?\d{1,50})\}\{(?P<b>\d{1,50})\}|(?P<c>\d{1,50})/(?P<d>\d{1,50}))"
)
_SHORT = 100


def rational(text: str) -> Fraction | None:
    """The number that a short plain numeral means: integers, decimals, fractions, scientific notation."""
    if len(text) > _SHORT:
        return None
    if _PLAIN.fullmatch(text):
        return Fraction(text.replace(",", ""))
    fraction = _FRACTION.fullmatch(text)
    if fraction is not None:
        below = int(fraction["b"] or fraction["d"])
        value = Fraction(int(fraction["a"] or fraction["c"]), below) if below else None
        return -value if value is not None and fraction["sign"] == "-" else value
    return scientific(text)


def scientific(text: str) -> Fraction | None:
    """4.5e33, 4.5\\times10^{33}, 10^{33}."""
    match = _SCIENTIFIC.fullmatch(text)
    if match is None:
        return None
    exponent = int(match["e"] or match["braced"] or match["bare"])
    if abs(exponent) > LARGEST_EXPONENT or (match["e"] and not match["mantissa"]):
        return None
    return Fraction(match["mantissa"] or 1) * Fraction(10) ** exponent


def spell_out(text: str) -> str:
    r"""Numerals of other bases and repeating decimals as \exact{p/q}, which the parser reads."""
    text = _REPEATING.sub(_repeating, text)
    return _BASED.sub(_based, text)


def _exact(value: Fraction) -> str:
    return rf" \exact{{{value.numerator}/{value.denominator}}} "


def _based(match: re.Match[str]) -> str:
    name = match["braced"] or match["text"] or match["bare"] or match["said"]
    base = _BASE_WORDS.get(name) or int(name)
    whole, _, part = match["digits"].partition(".")
    places = [_DIGITS.index(digit) for digit in whole + part]
    if not 2 <= base <= 36 or max(places) >= base:
        return match.group()
    value = 0
    for digit in places:
        value = value * base + digit
    return _exact(Fraction(value, base ** len(part)))


def _repeating(match: re.Match[str]) -> str:
    fixed = match["fixed"]
    if match["tail"] is not None:
        shape = _period(fixed)
        if shape is None:
            return match.group()
        fixed, period = shape
    elif match["dots"] is not None:
        period = re.sub(r"\D", "", match["dots"])
    else:
        period = re.sub(r"\s", "", match["line"] or match["digit"] or match["paren"])
    ones = 10 ** len(period) - 1
    return _exact(
        Fraction(int(match["whole"] or 0))
        + (Fraction(int(fixed or 0)) + Fraction(int(period), ones)) / 10 ** len(fixed)
    )


def _period(digits: str) -> tuple[str, str] | None:
    """The digits before the period and the period, if what is written shows it: 1666 -> 1, 6; 142142 -> "", 142.

    One digit has to stand three times; a longer period twice."""
    for length in range(1, len(digits) // 2 + 1):
        period = digits[-length:]
        times = 0
        while digits.endswith(period * (times + 1)):
            times += 1
        if times >= (3 if length == 1 else 2):
            head = digits[: len(digits) - times * length]
            return head, period
    return None
