"""The tree that a text is read as.

op        args                    value
num                               Fraction
dec                               Decimal as it is written: `Literal`
sym                               name, subscripts and primes included; "e", "i", "pi" and "inf" are constants
text                              words
add mul                           any number
neg div pow                       one, two, two
pm                                one or two: ±b, a±b; value "mp" for ∓
root      radicand, index
func      arguments               name: sin, ln, floor, binom, ...
call      arguments               name of an unknown function, as f in f(x)
log       argument[, base]
percent degree                    one
group     items                   its brackets: "()", "(]", "[)", "[]"
set list  items                   list: its separator, one of "," "and" "or" ";"
matrix    rows, each a list       kind: "matrix" or "det"
rel       sides                   tuple of relations between them
union inter minus                 sets
ratio     two or more
quantity  one                     unit, as it is written
dots
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

CONSTANTS = frozenset({"e", "i", "pi", "inf"})


@dataclass(frozen=True, slots=True)
class Node:
    op: str
    args: tuple[Node, ...] = ()
    value: Any = None


@dataclass(frozen=True, slots=True)
class Literal:
    """A decimal as written: 0.050 has three places and two significant digits."""

    number: Fraction
    places: int
    significant: int


class UnreadableError(Exception):
    """The text is not read as a tree."""


def integer(value: int) -> Node:
    return Node("num", value=Fraction(value))


def symbols(node: Node) -> set[str]:
    """The variables in a tree."""
    if node.op == "sym":
        return set() if node.value in CONSTANTS else {node.value}
    found: set[str] = {node.value} if node.op == "call" else set()
    for arg in node.args:
        found |= symbols(arg)
    return found


def contains(node: Node, *ops: str) -> bool:
    return node.op in ops or any(contains(arg, *ops) for arg in node.args)


def key(node: Node) -> str:
    """The same for trees that differ in the order of sums, products and sets only."""
    parts = [key(arg) for arg in node.args]
    if node.op in ("add", "mul", "set", "union", "inter"):
        parts.sort()
    value = node.value.number if isinstance(node.value, Literal) else node.value
    # Huge integers are never written out in decimal: that takes quadratic time.
    label = f"{value.numerator:x}/{value.denominator:x}" if isinstance(value, Fraction) else str(value)
    op = "num" if node.op == "dec" else node.op
    return f"{op}:{label}({','.join(parts)})"
