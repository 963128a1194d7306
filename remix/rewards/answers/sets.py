"""Sets of real numbers: intervals, points, unions, inequalities, as sorted pieces of the real line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mpmath  # type: ignore[import-untyped]

from remix.rewards.answers.nodes import Node, UnreadableError, symbols
from remix.rewards.answers.values import DIGITS, close, constant, evaluate

FLIPPED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "=": "=", "ne": "ne"}


@dataclass(frozen=True, slots=True)
class Piece:
    low: Any
    high: Any
    low_closed: bool
    high_closed: bool


LINE: tuple[Piece, ...] = (Piece(mpmath.ninf, mpmath.inf, False, False),)


@mpmath.workdps(DIGITS)  # type: ignore[untyped-decorator]
def pieces(node: Node) -> tuple[Piece, ...]:
    """The set that a tree means, its pieces in order and not touching. Raises `UnreadableError` if it means none."""
    match node.op:
        case "group" if len(node.args) == 2:
            low, high = _end(node.args[0]), _end(node.args[1])
            if low >= high:
                raise UnreadableError("not an interval")
            return (Piece(low, high, node.value[0] == "[", node.value[1] == "]"),)
        case "set":
            return _join([Piece(value, value, True, True) for value in map(_end, node.args)])
        case "sym" if node.value == "mathbb R":
            return LINE
        case "union":
            return _join([piece for arg in node.args for piece in pieces(arg)])
        case "list" if node.value == "or":
            return _join([piece for arg in node.args for piece in pieces(arg)])
        case "list" if node.value in ("and", ",") and all(arg.op == "rel" for arg in node.args):
            found: tuple[Piece, ...] = pieces(node.args[0])
            for arg in node.args[1:]:
                other = pieces(arg)
                found = _meet(found, other) or (_join([*found, *other]) if node.value == "," else ())
            return found
        case "list" if node.value in ("and", ","):
            return _join([piece for arg in node.args for piece in pieces(arg)])
        case "inter":
            return _meet(pieces(node.args[0]), pieces(node.args[1]))
        case "minus":
            return _meet(pieces(node.args[0]), complement(pieces(node.args[1])))
        case "rel":
            return _solutions(node)
    raise UnreadableError(f"{node.op} is no set")


def same(first: tuple[Piece, ...], second: tuple[Piece, ...]) -> bool:
    return len(first) == len(second) and all(
        _equal(a.low, b.low)
        and _equal(a.high, b.high)
        and (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed)
        for a, b in zip(first, second, strict=True)
    )


def complement(found: tuple[Piece, ...]) -> tuple[Piece, ...]:
    gaps = []
    low, closed = mpmath.ninf, False
    for piece in found:
        if low < piece.low or (low == piece.low and closed and not piece.low_closed):
            gaps.append(Piece(low, piece.low, closed, not piece.low_closed))
        low, closed = piece.high, not piece.high_closed
    if low < mpmath.inf:
        gaps.append(Piece(low, mpmath.inf, closed, False))
    return tuple(gaps)


def _end(node: Node) -> Any:
    sign = 1
    while node.op == "neg":
        sign, node = -sign, node.args[0]
    if node.op == "sym" and node.value == "inf":
        return sign * mpmath.inf
    value = constant(node)
    if isinstance(value, mpmath.mpc):
        raise UnreadableError("not a real number")
    return sign * value


def _equal(first: Any, second: Any) -> bool:
    return bool(first == second) or (not mpmath.isinf(first) and not mpmath.isinf(second) and close(first, second))


def _join(found: list[Piece]) -> tuple[Piece, ...]:
    joined: list[Piece] = []
    for piece in sorted(found, key=lambda piece: (piece.low, not piece.low_closed)):
        last = joined[-1] if joined else None
        if last is not None and (
            piece.low < last.high or (_equal(piece.low, last.high) and (piece.low_closed or last.high_closed))
        ):
            if piece.high > last.high:
                joined[-1] = Piece(last.low, piece.high, last.low_closed, piece.high_closed)
            elif _equal(piece.high, last.high):
                joined[-1] = Piece(last.low, last.high, last.low_closed, last.high_closed or piece.high_closed)
        else:
            joined.append(piece)
    return tuple(joined)


def _meet(first: tuple[Piece, ...], second: tuple[Piece, ...]) -> tuple[Piece, ...]:
    found = []
    for a in first:
        for b in second:
            low, high = max(a.low, b.low), min(a.high, b.high)
            low_closed = all(x.low_closed for x in (a, b) if x.low == low)
            high_closed = all(x.high_closed for x in (a, b) if x.high == high)
            if low < high or (low == high and low_closed and high_closed):
                found.append(Piece(low, high, low_closed, high_closed))
    return _join(found)


# --- inequalities in one variable ---------------------------------------------------------------------------------


def _solutions(node: Node) -> tuple[Piece, ...]:
    if node.value == ("in",):
        inside: tuple[Piece, ...] = pieces(node.args[1])
        return inside
    found: tuple[Piece, ...] = LINE
    for position, relation in enumerate(node.value):
        found = _meet(found, _half_line(node.args[position], relation, node.args[position + 1]))
    return found


def _half_line(left: Node, relation: str, right: Node) -> tuple[Piece, ...]:
    """Where left - right, linear in its one variable (or in one term such as f(x)), has the sign asked for."""
    if relation not in FLIPPED:
        raise UnreadableError(relation)
    if left.op == "call" and not _numeric(left) and _numeric(right):
        return _ray(relation, constant(right))
    if right.op == "call" and not _numeric(right) and _numeric(left):
        return _ray(FLIPPED[relation], constant(left))
    if "inf" in (left.value, right.value) or _infinite(left) or _infinite(right):
        if relation in ("<", ">"):
            return LINE
        raise UnreadableError("reaches infinity")
    names = symbols(left) | symbols(right)
    if len(names) != 1:
        raise UnreadableError("not in one variable")
    (name,) = names
    difference = Node("add", (left, Node("neg", (right,))))
    zero, one, two, seven = (evaluate(difference, {name: mpmath.mpf(x)}) for x in (0, 1, 2, 7))
    slope = one - zero
    if isinstance(slope, mpmath.mpc):
        raise UnreadableError("not a real number")
    if not close(two - one, slope) or not close(seven - two, 5 * slope) or slope == 0 or abs(slope) < 1e-30:
        raise UnreadableError("not linear")
    return _ray(relation if slope > 0 else FLIPPED[relation], -zero / slope)


def _numeric(node: Node) -> bool:
    return not symbols(node) and not _infinite(node)


def _infinite(node: Node) -> bool:
    return node.value == "inf" or (node.op == "neg" and _infinite(node.args[0]))


def _ray(relation: str, at: Any) -> tuple[Piece, ...]:
    if isinstance(at, mpmath.mpc):
        raise UnreadableError("not a real number")
    below = Piece(mpmath.ninf, at, False, relation == "le")
    above = Piece(at, mpmath.inf, relation == "ge", False)
    if relation == "=":
        return (Piece(at, at, True, True),)
    if relation == "ne":
        return (below, above)
    return (below,) if relation in ("<", "le") else (above,)
