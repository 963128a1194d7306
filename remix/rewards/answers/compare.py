"""Are two trees the same answer?

An ordered thing equals an ordered thing, an unordered one an unordered one; a bare list may be either. Numbers are
compared exactly where they are rational, else to thirty digits; expressions at sample points. A rounded decimal is
an exact number only if it shows enough digits, and never another decimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from remix.rewards.answers import equations, sets, values
from remix.rewards.answers.nodes import Literal, Node, UnreadableError, contains, key, symbols
from remix.rewards.answers.normalise import words
from remix.rewards.answers.units import SINGLE_LETTERS, same_dimension

RATIONAL_DIGITS, IRRATIONAL_DIGITS = 4, 8
"""Significant digits from which a correctly rounded decimal counts as the exact answer, 0.3333 as 1/3."""
FLOAT_NOISE = Fraction(1, 10**15)
"""0.30000000000000004 is 0.3."""
MOST_ITEMS = 200

_FAILURES = (
    UnreadableError,
    values.TooLargeError,
    ValueError,
    ZeroDivisionError,
    OverflowError,
    TypeError,
    AttributeError,
)


class Comparison:
    """`tolerance`: the relative error that a benchmark allows a numerical answer; None for none."""

    def __init__(self, tolerance: float | None = None) -> None:
        self._tolerance = None if tolerance is None else Fraction(tolerance)

    def equal(self, gold: Node, answer: Node) -> bool:
        if key(gold) == key(answer):
            return True
        if gold.op == "quantity" or answer.op == "quantity":
            return self._quantities(gold, answer)
        if gold.op == "rel" or answer.op == "rel":
            return self._relations(gold, answer)
        if contains(gold, "pm") or contains(answer, "pm"):
            return self._signs(gold, answer)
        if gold.op == "text" or answer.op == "text":
            return _text(gold) is not None and _text(gold) == _text(answer)
        if gold.op in ("percent", "degree") or answer.op in ("percent", "degree"):
            return self._marks(gold, answer)
        if {gold.op, answer.op} & {"union", "inter", "minus"} or "mathbb R" in (gold.value, answer.value):
            return _same_sets(gold, answer)
        if _is_collection(gold) or _is_collection(answer):
            return self._collections(gold, answer)
        if gold.op == "matrix" or answer.op == "matrix":
            return self._matrices(gold, answer)
        if gold.op == "ratio" or answer.op == "ratio":
            return self._ratios(gold, answer)
        return self._numbers(gold, answer)

    # --- numbers and expressions ---

    def _numbers(self, gold: Node, answer: Node) -> bool:
        try:
            wanted, got = values.exact(gold), values.exact(answer)
        except values.TooLargeError:
            return False  # equal trees have been recognised before
        except UnreadableError:
            return False
        if wanted is not None and got is not None:
            return self._rationals(gold, wanted, answer, got)
        try:
            if self._tolerance is not None and not symbols(gold) and not symbols(answer):
                return self._tolerated(values.constant(gold), values.constant(answer))
            if self._identical(gold, answer):
                return True
            return (_rounded(gold) or _rounded(answer)) and _rounds_to(gold, answer)
        except _FAILURES:
            return False

    def _identical(self, gold: Node, answer: Node) -> bool:
        if values.identical(gold, answer):
            return True
        logs = contains(gold, "log") or contains(answer, "log")
        return logs and values.identical(gold, answer, log_base=10)

    def _rationals(self, gold: Node, wanted: Fraction, answer: Node, got: Fraction) -> bool:
        if wanted == got:
            return True
        if self._tolerance is not None:
            return abs(wanted - got) <= self._tolerance * abs(wanted)
        if _rounded(gold) and _rounded(answer):
            digits = max(_literal(node).significant for node in (gold, answer))
            return digits >= 15 and abs(wanted - got) <= FLOAT_NOISE * abs(wanted)
        if _rounded(answer):
            return _is_rounding(_literal(answer), got, wanted, RATIONAL_DIGITS)
        if _rounded(gold) and wanted.denominator != 1:
            return _is_rounding(_literal(gold), wanted, got, RATIONAL_DIGITS - 1)
        return False

    def _tolerated(self, wanted: object, got: object) -> bool:
        assert self._tolerance is not None
        return bool(abs(wanted - got) <= float(self._tolerance) * abs(wanted))  # type: ignore[operator, arg-type]

    def _marks(self, gold: Node, answer: Node) -> bool:
        """50 % is 50 to whoever asked for a percentage, and 0.5; the sign of degrees may be left out, too."""
        if gold.op == answer.op:
            return self.equal(gold.args[0], answer.args[0])
        marked, other = (gold, answer) if gold.op in ("percent", "degree") else (answer, gold)
        if other.op in ("percent", "degree"):
            return False
        bare = marked.args[0]
        pair = (bare, other) if marked is gold else (other, bare)
        return self.equal(*pair) or self._numbers(*((marked, other) if marked is gold else (other, marked)))

    # --- units ---

    def _quantities(self, gold: Node, answer: Node) -> bool:
        unit, other = _unit(gold), _unit(answer)
        bare, bare_answer = _bare(gold), _bare(answer)
        if unit is None or other is None:
            with_letter = _letter_unit(gold if unit is None else answer)
            if with_letter is None:
                return self.equal(bare, bare_answer)
            bare, unit = (with_letter[0], with_letter[1]) if unit is None else (bare, unit)
            bare_answer, other = (with_letter[0], with_letter[1]) if other is None else (bare_answer, other)
        scales = same_dimension(unit, other)
        if scales is None:
            return False
        if scales[0] == scales[1]:
            return self.equal(bare, bare_answer)
        scaled = Node("mul", (bare_answer, Node("num", value=scales[1] / scales[0])))
        return self.equal(bare, scaled)

    def letter_units(self, gold: Node, answer: Node) -> bool:
        """3s and 0.5m, where the gold has no variables: a letter behind the number of a response is its unit."""
        without = _letter_unit(answer)
        return without is not None and gold.op != "quantity" and not symbols(gold) and self.equal(gold, without[0])

    # --- several answers ---

    def _signs(self, gold: Node, answer: Node) -> bool:
        """± means two answers; signs that stand together are chosen together."""
        return self.equal(_both_signs(gold), _both_signs(answer))

    def _collections(self, gold: Node, answer: Node) -> bool:
        if gold.op == "matrix" or answer.op == "matrix":
            return self._matrices(gold, answer)
        for one, other in ((gold, answer), (answer, gold)):
            if one.op in ("set", "list") and len(one.args) == 1:
                pair = (one.args[0], other) if one is gold else (other, one.args[0])
                return not _is_collection(other) and self.equal(*pair)
        if not (_is_collection(gold) and _is_collection(answer)):
            return False
        wanted, got = _items(gold), _items(answer)
        kinds = {gold.op, answer.op}
        if max(len(wanted), len(got)) > MOST_ITEMS or (len(wanted) != len(got) and kinds == {"group"}):
            return False
        if kinds == {"group"}:
            return _same_brackets(gold, answer) and self._in_order(wanted, got)
        if kinds == {"group", "set"}:
            return False
        if kinds == {"group", "list"}:
            group = gold if gold.op == "group" else answer
            return group.value == "()" and len(wanted) == len(got) and self._in_order(wanted, got)
        if any(node.op == "dots" for node in (*wanted, *got)) or _assigns(gold) != _assigns(answer):
            return len(wanted) == len(got) and self._in_order(wanted, got)
        return self._any_order(wanted, got, distinct=kinds != {"list"})

    def _in_order(self, wanted: Sequence[Node], got: Sequence[Node]) -> bool:
        return all(self.equal(a, b) for a, b in zip(wanted, got, strict=True))

    def _any_order(self, wanted: Sequence[Node], got: Sequence[Node], distinct: bool) -> bool:
        """Each has its partner. In sets repetition does not count, nor does that of tuples in a list."""
        if len(wanted) == len(got) and self._in_order(wanted, got):
            return True
        free = list(got)
        for item in wanted:
            partner = next((other for other in free if self.equal(item, other)), None)
            if partner is None:
                if distinct and any(self.equal(item, other) for other in got):
                    continue
                return False
            free.remove(partner)
        return not free or all(
            (distinct or other.op == "group") and any(self.equal(item, other) for item in wanted) for other in free
        )

    def _matrices(self, gold: Node, answer: Node) -> bool:
        if gold.op == answer.op == "matrix" and gold.value != answer.value:
            return False
        wanted, got = _rows(gold), _rows(answer)
        if wanted is None or got is None or gold.value == "det" or answer.value == "det":
            return False
        if [len(row) for row in wanted] != [len(row) for row in got]:
            return False
        return all(self._in_order(a, b) for a, b in zip(wanted, got, strict=True))

    def _ratios(self, gold: Node, answer: Node) -> bool:
        """2 : 4 is 1 : 2 and one half."""
        if _is_time(gold) and _is_time(answer):
            return False  # equal trees have been recognised before
        if any(node.op == "ratio" and len(node.args) != 2 for node in (gold, answer)):
            if gold.op != answer.op or len(gold.args) != len(answer.args):
                return False
            firsts = [(a, b) for a, b in zip(gold.args, answer.args, strict=True)]
            return all(self._proportional(firsts[0], pair) for pair in firsts[1:])
        one, other = (Node("div", node.args) if node.op == "ratio" else node for node in (gold, answer))
        return self._numbers(one, other)

    def _proportional(self, first: tuple[Node, Node], second: tuple[Node, Node]) -> bool:
        return self._numbers(Node("mul", (first[0], second[1])), Node("mul", (first[1], second[0])))

    # --- equations ---

    def _relations(self, gold: Node, answer: Node) -> bool:
        said, got = equations.value_of(gold, lenient=False), equations.value_of(answer, lenient=True)
        if gold.op == answer.op == "rel":
            if equations.same_relation(gold, answer):
                return True
            if not said or not got:
                return False
            if not _same_name(gold.args[0], answer.args[0]):
                renamed = _renamed(gold, answer)
                return renamed is not None and self.equal(said[0], renamed)
            return any(self.equal(a, b) for a in said[:1] for b in got)
        relation, plain = (gold, answer) if gold.op == "rel" else (answer, gold)
        sides = said if relation is gold else got
        if sides and any(self.equal(side, plain) if relation is gold else self.equal(plain, side) for side in sides):
            return True
        return _same_sets(gold, answer)


def _text(node: Node) -> str | None:
    if node.op == "text":
        return words(node.value)
    return node.value.lower() if node.op == "sym" and len(node.value) == 1 else None


def _same_sets(gold: Node, answer: Node) -> bool:
    try:
        return sets.same(sets.pieces(gold), sets.pieces(answer))
    except _FAILURES:
        return False


def _literal(node: Node) -> Literal:
    node = node.args[0] if node.op == "neg" else node
    assert isinstance(node.value, Literal)
    return node.value


def _rounded(node: Node) -> bool:
    return node.op == "dec" or (node.op == "neg" and node.args[0].op == "dec")


def _is_rounding(literal: Literal, shown: Fraction, true: Fraction, least: int) -> bool:
    """Whether a decimal is what an exact number that has no end is when rounded."""
    below = true.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below > 1 and literal.significant >= least and abs(true - shown) <= Fraction(1, 2 * 10**literal.places)


def _rounds_to(gold: Node, answer: Node) -> bool:
    """The same for a number that is not rational."""
    decimal, other = (gold, answer) if _rounded(gold) else (answer, gold)
    shown = values.exact(decimal)
    least = IRRATIONAL_DIGITS - 3 if decimal is gold else IRRATIONAL_DIGITS
    if symbols(other) or shown is None or _literal(decimal).significant < least:
        return False
    difference = abs(values.constant(other) - values.constant(decimal))
    return bool(difference * 2 * 10 ** _literal(decimal).places <= 1)


def _unit(node: Node) -> str | None:
    return node.value if node.op == "quantity" else None


def _bare(node: Node) -> Node:
    return node.args[0] if node.op == "quantity" else node


def _letter_unit(node: Node) -> tuple[Node, str] | None:
    """3 and "s" of 3s, 15 and "m^2" of 15m^2: a number times a letter that may be a unit."""
    if node.op == "neg":
        inner = _letter_unit(node.args[0])
        return None if inner is None else (Node("neg", (inner[0],)), inner[1])
    if node.op != "mul":
        return None
    number, letter = node.args[0], node.args[-1]
    power = ""
    if letter.op == "pow" and letter.args[1].op == "num" and letter.args[1].value in (2, 3):
        power, letter = f"^{letter.args[1].value}", letter.args[0]
    if len(node.args) != 2 or letter.op != "sym" or letter.value not in SINGLE_LETTERS or symbols(number):
        return None
    return number, letter.value + power


def _is_collection(node: Node) -> bool:
    return node.op in ("group", "set", "list")


def _items(node: Node) -> tuple[Node, ...]:
    """The items of a list; those of lists within a list of semicolons, p=5,q=2;p=7,q=2, are tuples."""
    if node.op == "list":
        return tuple(Node("group", arg.args, "()") if arg.op == "list" else arg for arg in node.args)
    return node.args


def _assigns(node: Node) -> bool:
    """x = 1, y = 2: each item is about a thing of its own, so their order tells them apart once the names are gone."""
    names = [key(arg.args[0]) for arg in node.args if arg.op == "rel"]
    return node.op == "list" and len(names) == len(node.args) == len(set(names))


def _same_brackets(gold: Node, answer: Node) -> bool:
    return bool(gold.value == answer.value) or (len(gold.args) > 2 and {gold.value, answer.value} == {"()", "[]"})


def _rows(node: Node) -> list[tuple[Node, ...]] | None:
    """The rows of a matrix, of [[1, 2], [3, 4]], or of a vector written as a tuple."""
    if node.op == "matrix":
        rows = [row.args for row in node.args]
        return [tuple(cell for row in rows for cell in row)] if len(rows) == 1 or len(rows[0]) == 1 else rows
    if node.op == "group" and all(arg.op == "group" for arg in node.args):
        return [arg.args for arg in node.args]
    return [node.args] if node.op == "group" and node.value in ("()", "[]") else None


def _is_time(node: Node) -> bool:
    """12:30 is not 2:5."""
    values_of = [arg.value for arg in node.args if arg.op == "num"]
    return (
        node.op == "ratio" and len(values_of) == len(node.args) == 2 and values_of[0] <= 24 and 10 <= values_of[1] < 60
    )


def _both_signs(node: Node) -> Node:
    if _is_collection(node):
        items: list[Node] = []
        for arg in node.args:
            both = _both_signs(arg)
            items += both.args if both.op == "list" and contains(arg, "pm") and not _is_collection(arg) else [both]
        return Node(node.op, tuple(items), node.value)
    if not contains(node, "pm"):
        return node
    if node.op == "rel":
        return Node("list", (_chosen(node, 1), _chosen(node, -1)), "or")
    return Node("list", (_chosen(node, 1), _chosen(node, -1)), ",")


def _chosen(node: Node, sign: int) -> Node:
    args = tuple(_chosen(arg, sign) for arg in node.args)
    if node.op != "pm":
        return Node(node.op, args, node.value)
    last = args[-1] if sign * (1 if node.value == "pm" else -1) > 0 else Node("neg", (args[-1],))
    return last if len(args) == 1 else Node("add", (args[0], last))


def _same_name(gold: Node, answer: Node) -> bool:
    if key(gold) == key(answer):
        return True
    # y = ... and f(x) = ... both say what the function is.
    kinds = {gold.op, answer.op}
    return kinds == {"sym", "call"} and "y" in (gold.value, answer.value)


def _renamed(gold: Node, answer: Node) -> Node | None:
    """The value of f(n) = n^2 with the gold's letter in place of n: the letter of an argument means nothing."""
    left, right = gold.args[0], answer.args[0]
    if not left.op == right.op == "call" or left.value != right.value or len(left.args) != len(right.args):
        return None
    if any(arg.op != "sym" for arg in (*left.args, *right.args)) or symbols(answer.args[-1]) - {
        arg.value for arg in right.args
    } & {arg.value for arg in left.args}:
        return None
    names = {b.value: a.value for a, b in zip(left.args, right.args, strict=True)}
    return _substitute(answer.args[-1], names)


def _substitute(node: Node, names: dict[str, str]) -> Node:
    if node.op == "sym":
        return Node("sym", value=names.get(node.value, node.value))
    return Node(node.op, tuple(_substitute(arg, names) for arg in node.args), node.value)
