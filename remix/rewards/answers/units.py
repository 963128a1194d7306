"""What stands behind a number: kilometres, dollars, apples."""

from __future__ import annotations

import re
from fractions import Fraction

_LONG_PREFIXES = {"kilo": "1000", "centi": "0.01", "milli": "0.001", "deci": "0.1", "mega": "1e6", "giga": "1e9"}
_LONG_PREFIXES |= {"micro": "1e-6", "nano": "1e-9"}
_SHORT_PREFIXES = {"k": "1000", "c": "0.01", "m": "0.001", "d": "0.1"}
_PREFIXED = ("m", "g", "s", "l", "n", "j", "w", "v", "pa", "hz")

_TABLE = {
    "m": "m 1, meter 1, metre 1, in 0.0254, inch 0.0254, inche 0.0254, "
    "foot 0.3048, feet 0.3048, ft 0.3048, yard 0.9144, "
    "yd 0.9144, mile 1609.344, mi 1609.344, angstrom 1e-10, parsec 30856775814913673, au 149597870700",
    "g": "g 1, gram 1, ton 1e6, tonne 1e6, pound 453.59237, lb 453.59237, ounce 28.349523125, oz 28.349523125",
    "s": "s 1, sec 1, second 1, min 60, minute 60, h 3600, hr 3600, hour 3600, day 86400, week 604800",
    "month": "month 1, year 12, yr 12",
    "litre": "l 1, liter 1, litre 1",
    "gallon": "gallon 1, gal 1, quart 0.25, pint 0.125, cup 0.0625",
    "N": "n 1, newton 1",
    "J": "j 1, joule 1",
    "W": "w 1, watt 1",
    "V": "v 1, volt 1",
    "C": "c 1, coulomb 1",
    "K": "k 1, kelvin 1",
    "Hz": "hz 1, hertz 1",
    "Pa": "pa 1, pascal 1",
    "mol": "mol 1, mole 1",
    "eV": "ev 1",
    "cal": "cal 1, calorie 1",
    "erg": "erg 1",
    "dollar": "dollar 1, buck 1, cent 0.01, penny 0.01, pennie 0.01",
    "euro": "euro 1",
    "sterling": "sterling 1",
    "yen": "yen 1",
    "rupee": "rupee 1",
    "yuan": "yuan 1",
    "rad": "rad 1, radian 1",
    "am": "am 1",
    "pm": "pm 1",
}
"""By what is measured: the names, in the singular, and how much each is."""
_UNITS = {
    entry.split()[0]: (Fraction(entry.split()[1]), kind) for kind, row in _TABLE.items() for entry in row.split(", ")
}
_SQUARES, _CUBES = ("square", "sq"), ("cubic", "cu")
_SILENT = ("unit", "units", "per", "of", "the", "each", "a", "an")
_SHORT_WORDS = frozenset(
    [
        "cm",
        "mm",
        "km",
        "dm",
        "nm",
        "kg",
        "mg",
        "ft",
        "yd",
        "mi",
        "lb",
        "lbs",
        "oz",
        "hr",
        "hrs",
        "min",
        "mins",
        "sec",
        "secs",
        "ml",
        "mL",
        "kJ",
        "kN",
        "kW",
        "Hz",
        "kHz",
        "MHz",
        "eV",
        "keV",
        "MeV",
        "Pa",
        "kPa",
        "mol",
        "mph",
        "kph",
        "yr",
        "yrs",
        "gal",
        "rad",
        "am",
        "pm",
        "AM",
        "PM",
        "sq",
        "cu",
        "per",
    ]
)
SINGLE_LETTERS = frozenset("mgshNJWVCKLAFTl")
"""Letters that stand for a unit behind a number, where they are no variable."""
_SPEEDS = {"mph": "mile / hour", "kph": "km / hour", "kmph": "km / hour"}
_PIECE = re.compile(r"[A-Za-z]+|\^?\s?\{?-?\d{1,2}\}?|/")

Dimension = tuple[tuple[str, int], ...]


def is_unit_word(word: str) -> bool:
    """Whether a bare word is a unit rather than a product of variables."""
    return word in _SHORT_WORDS or (len(word) >= 4 and _known(word) is not None)


def measure(unit: str) -> tuple[Fraction, Dimension] | None:
    """How many base units it is; None for what is counted rather than measured, such as students."""
    for name, spelt in _SPEEDS.items():
        unit = re.sub(rf"\b{name}\b", spelt, unit)
    factors: list[tuple[Fraction, str, int]] = []  # size, what it measures, power
    sign, coming = 1, 1
    for piece in _PIECE.findall(unit):
        word = piece.lower()
        if word in ("/", "per"):
            sign = -1
        elif not word.isalpha():
            if not factors:
                return None
            size, kind, power = factors.pop()
            factors.append((size, kind, power * int(word.strip("^{ }"))))
        elif word in _SQUARES or word in _CUBES:
            coming = 2 if word in _SQUARES else 3
        elif word not in _SILENT:
            known = _known(piece)
            if known is None:
                return None
            factors.append((known[0], known[1], sign * coming))
            coming = 1
    scale, powers = Fraction(1), dict.fromkeys((kind for _, kind, _ in factors), 0)
    for size, kind, power in factors:
        scale *= size**power
        powers[kind] += power
    return scale, tuple(sorted((kind, power) for kind, power in powers.items() if power))


def _known(word: str) -> tuple[Fraction, str] | None:
    lower = word.lower()
    for stem in (lower, lower.removesuffix("s")):
        if stem in _UNITS:
            return _UNITS[stem]
        for prefix, factor in _LONG_PREFIXES.items():
            rest = stem.removeprefix(prefix)
            if rest != stem and len(rest) > 2 and rest in _UNITS:
                return _UNITS[rest][0] * Fraction(factor), _UNITS[rest][1]
    if len(word) in (2, 3) and word[0] in _SHORT_PREFIXES and lower[1:] in _PREFIXED:
        size, kind = _UNITS[lower[1:]]
        return size * Fraction(_SHORT_PREFIXES[word[0]]), kind
    return None


def same_dimension(first: str, second: str) -> tuple[Fraction, Fraction] | None:
    """The scales of two units that measure the same thing; None if they do not.

    Things that are counted differ in name only: 5 students are 5 people."""
    one, two = measure(first), measure(second)
    if one is None or two is None or not one[1] or not two[1]:
        return Fraction(1), Fraction(1)
    return (one[0], two[0]) if one[1] == two[1] else None
