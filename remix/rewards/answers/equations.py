"""Equations and inequalities: which part of "x = 3 + 2 = 5" is the answer, and when two of them say the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mpmath  # type: ignore[import-untyped]

from remix.rewards.answers.nodes import Node, UnreadableError, key, symbols
from remix.rewards.answers.sets import FLIPPED, pieces, same
from remix.rewards.answers.values import DIGITS, TooLargeError, close, constant, evaluate, points

_EQUAL = ("=", "approx", "equiv")


def is_name(node: Node) -> bool:
    """Whether a side only names what the other side is: x, f(x), a_n, |AB|, (p, q), \\angle ABC, A : B, NO/BO."""
    match node.op:
        case "sym":
            return node.value not in ("e", "i", "pi", "inf")
        case "call" | "text":
            return True
        case "group" | "ratio":
            return all(is_name(arg) for arg in node.args)
        case "func" if node.value == "abs":
            return is_name(node.args[0])
        case "div":
            return all(_is_segment(arg) or (arg.op == "sym" and arg.value.isupper()) for arg in node.args)
        case "mul":
            return _is_segment(node)
    return False


def _is_segment(node: Node) -> bool:
    """AB, \\angle ABC, m\\angle B: capital letters side by side."""
    factors = _factors(node)
    if len(factors) == 2 and factors[0].value in ("Delta", "delta", "d") and factors[1].op == "sym":
        return True
    return len(factors) > 1 and all(
        factor.op == "sym" and (factor.value[0].isupper() or factor.value in ("angle", "triangle", "m", "d"))
        for factor in factors
    )


def _factors(node: Node) -> list[Node]:
    return [factor for arg in node.args for factor in _factors(arg)] if node.op == "mul" else [node]


def _is_plain_combination(node: Node) -> bool:
    """m + n or abc: what such a sum is worth is a number asked for rather than a curve."""
    args = node.args if node.op == "add" else tuple(_factors(node))
    names = [arg.value for arg in args if arg.op == "sym" and arg.value not in ("x", "y", "z", "e", "i", "pi")]
    return len(args) > 1 and len(names) == len(args) == len(set(names))


def value_of(node: Node, lenient: bool) -> list[Node]:
    """What an equation says that something is; what it is roughly, too, if that agrees. Empty if it is no assignment.

    `lenient`: in a response, where "m + n = 7" answers what m + n is."""
    if node.op != "rel" or not all(relation in (*_EQUAL, "in") for relation in node.value):
        return []
    sides = list(node.args)
    first = sides[0]
    if not (is_name(first) or not symbols(first) or (lenient and _is_plain_combination(first))):
        return []
    if len(sides) == 2 and not symbols(first) and is_name(sides[1]):  # 5 = x
        return [first]
    roughly = node.value.index("approx") if "approx" in node.value else len(node.value)
    if not roughly:  # x \approx 11
        return [sides[1]] if is_name(first) else [first, sides[1]] if _agree(first, sides[1]) else []
    if not symbols(first) and first.op != "text" and not is_name(first) and not _chain_holds(sides[: roughly + 1]):
        return []
    said = sides[roughly]
    rough = sides[roughly + 1 : roughly + 2]
    return [said, *[side for side in rough if _agree(said, side)]]


def _chain_holds(sides: list[Node]) -> bool:
    """3 + 4 = 7 states 7; 3 + 4 = 8 states nothing."""
    return all(not symbols(side) for side in sides) and all(
        _worth(a) is not None and _worth(b) is not None and close(_worth(a), _worth(b)) for a, b in pairwise(sides)
    )


def _worth(node: Node) -> Any:
    try:
        return constant(node)
    except (UnreadableError, TooLargeError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _agree(said: Node, rough: Node) -> bool:
    if symbols(said) or symbols(rough):
        return False
    first, second = _worth(said), _worth(rough)
    return first is not None and second is not None and bool(abs(first - second) <= abs(first) * 0.005)


# --- two relations ------------------------------------------------------------------------------------------------


def same_relation(gold: Node, answer: Node) -> bool:
    """The same equation or inequality, rearranged or multiplied by a number."""
    if len(gold.value) == 1 and len(answer.value) == 1:
        return _same_single(gold, answer) or _same_solutions(gold, answer)
    if len(gold.value) != len(answer.value):
        return _same_solutions(gold, answer)
    if all(relation in FLIPPED for relation in gold.value):
        backwards = Node("rel", answer.args[::-1], tuple(FLIPPED.get(r, r) for r in reversed(answer.value)))
        if _same_chain(gold, answer) or _same_chain(gold, backwards):
            return True
    return _same_solutions(gold, answer)


def _same_solutions(gold: Node, answer: Node) -> bool:
    if symbols(gold) != symbols(answer):
        return False
    try:
        return same(pieces(gold), pieces(answer))
    except (UnreadableError, TooLargeError, ValueError, ZeroDivisionError, OverflowError):
        return False


def _same_chain(gold: Node, answer: Node) -> bool:
    return gold.value == answer.value and all(
        key(a) == key(b) or _ratio(a, b) == 1 for a, b in zip(gold.args, answer.args, strict=True)
    )


def _same_single(gold: Node, answer: Node) -> bool:
    wanted, got = gold.value[0], answer.value[0]
    wanted, got = ("=" if relation in _EQUAL else relation for relation in (wanted, got))
    if wanted not in FLIPPED or got not in FLIPPED:
        return key(gold) == key(answer)
    ratio = _ratio(_difference(gold), _difference(answer))
    if ratio is None:
        return False
    return wanted == (got if ratio > 0 else FLIPPED[got])


def _difference(node: Node) -> Node:
    return Node("add", (node.args[0], Node("neg", (node.args[1],))))


def _ratio(first: Node, second: Node) -> float | None:
    """The number that the first expression is of the second, if it is the same number everywhere."""
    names = sorted(symbols(first) | symbols(second))
    if not names or symbols(first) != symbols(second):
        return None
    ratios: list[Any] = []
    with mpmath.workdps(DIGITS):
        for env in points(names, False):
            try:
                above, below = evaluate(first, env), evaluate(second, env)
            except (UnreadableError, TooLargeError, ValueError, ZeroDivisionError, OverflowError):
                continue
            if isinstance(above, mpmath.mpc) or isinstance(below, mpmath.mpc) or below == 0 or above == 0:
                continue
            ratios.append(above / below)
        if len(ratios) < 3 or not all(close(ratio, ratios[0]) for ratio in ratios):
            return None
        return 1.0 if close(ratios[0], mpmath.mpf(1)) else float(ratios[0])
