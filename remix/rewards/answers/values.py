"""What a tree is worth: an exact fraction where it is one, else its value at sample points.

Nothing grows without bound: powers and factorials are refused before they are formed (`TooLargeError`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import mpmath  # type: ignore[import-untyped]

from remix.rewards.answers.nodes import Literal, Node, UnreadableError, contains, symbols

MOST_BITS = 200_000
"""Of an exact number."""
MOST_MAGNITUDE = 10**7
"""Binary exponent of a rounded number."""
DIGITS = 60
"""Of rounded numbers; two that agree to half of them are equal."""
SAMPLES = 14

Env = Mapping[str, Any]


class TooLargeError(Exception):
    """A number that nobody can write down."""


def exact(node: Node) -> Fraction | None:
    """The rational number that a tree of rational operations is; None if it is not one."""
    match node.op:
        case "num":
            return node.value  # type: ignore[no-any-return]
        case "dec":
            literal: Literal = node.value
            return literal.number
        case "quantity":
            return exact(node.args[0])
        case "percent":
            value = exact(node.args[0])
            return None if value is None else value / 100
        case "neg" | "add" | "mul" | "div" | "pow":
            args = []
            for arg in node.args:
                value = exact(arg)
                if value is None:
                    return None
                args.append(value)
            return _arithmetic(node.op, args)
        case "func" if node.value == "factorial":
            value = exact(node.args[0])
            if value is None or value.denominator != 1 or value < 0:
                return None
            if value > 10_000:
                raise TooLargeError
            return Fraction(math.factorial(int(value)))
        case "func" if node.value in ("floor", "ceil", "abs"):
            value = exact(node.args[0])
            if value is None:
                return None
            return (
                abs(value)
                if node.value == "abs"
                else Fraction({"floor": math.floor, "ceil": math.ceil}[node.value](value))
            )
        case "func" if node.value == "binom":
            above, below = exact(node.args[0]), exact(node.args[1])
            if above is None or below is None or above.denominator != 1 or below.denominator != 1 or above < 0:
                return None
            if above > 10_000:
                raise TooLargeError
            return Fraction(math.comb(int(above), int(below))) if below >= 0 else Fraction(0)
    return None


def _arithmetic(op: str, args: Sequence[Fraction]) -> Fraction | None:
    result = args[0]
    if op == "neg":
        return -result
    if op == "pow":
        return _power(result, args[1])
    for value in args[1:]:
        if _bits(result) + _bits(value) > MOST_BITS:
            raise TooLargeError
        if op == "add":
            result += value
        elif op == "mul":
            result *= value
        elif value == 0:
            raise UnreadableError("division by zero")
        else:
            result /= value
    return result


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    if base == 0:
        if exponent < 0:
            raise UnreadableError("division by zero")
        return Fraction(int(exponent == 0))
    if abs(base) == 1:
        return base if exponent % 2 else Fraction(1)
    if abs(exponent) * _bits(base) > MOST_BITS:
        raise TooLargeError
    return base ** int(exponent)


# --- rounded numbers ----------------------------------------------------------------------------------------------

_SAME_NAME = (
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "sinh",
    "cosh",
    "tanh",
    "coth",
    "sech",
    "csch",
    "exp",
    "floor",
    "ceil",
)
_FUNCTIONS: dict[str, Any] = {name: getattr(mpmath, name) for name in _SAME_NAME}
_FUNCTIONS |= {"arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "arccot": mpmath.acot}
_FUNCTIONS |= {"arcsec": mpmath.asec, "arccsc": mpmath.acsc, "arcsinh": mpmath.asinh, "arccosh": mpmath.acosh}
_FUNCTIONS |= {"arctanh": mpmath.atanh, "ln": mpmath.log, "abs": abs, "max": max, "min": min}
_FUNCTIONS |= {"Re": mpmath.re, "Im": mpmath.im, "sgn": mpmath.sign, "sign": mpmath.sign, "arg": mpmath.arg}


def evaluate(node: Node, env: Env, log_base: int | None = None) -> Any:
    """The value of an expression, its variables being those of `env`. A bare \\log is natural, or of `log_base`."""
    match node.op:
        case "num":
            return mpmath.mpf(node.value.numerator) / node.value.denominator
        case "dec":
            return mpmath.mpf(node.value.number.numerator) / node.value.number.denominator
        case "sym":
            return _symbol(node.value, env)
        case (
            "text" | "dots" | "group" | "list" | "set" | "matrix" | "rel" | "union" | "inter" | "minus" | "ratio" | "pm"
        ):
            raise UnreadableError(f"{node.op} is no number")
    args = [evaluate(arg, env, log_base) for arg in node.args]
    match node.op:
        case "neg":
            return -args[0]
        case "add":
            return mpmath.fsum(args)
        case "mul":
            return mpmath.fprod(args)
        case "div":
            if args[1] == 0:
                raise UnreadableError("division by zero")
            return args[0] / args[1]
        case "pow":
            return _rounded_power(*args)
        case "root":
            return _root(*args)
        case "percent":
            return args[0] / 100
        case "degree":
            return args[0] * mpmath.pi / 180
        case "quantity":
            return args[0]
        case "log":
            base = args[1] if len(args) > 1 else mpmath.mpf(log_base) if log_base else mpmath.e
            return mpmath.log(args[0]) / mpmath.log(base)
        case "call":
            return _symbol(node.value, env) * args[0] if len(args) == 1 else _opaque(node, args)
        case "func":
            return _function(node, args)
    raise UnreadableError(node.op)


def _symbol(name: str, env: Env) -> Any:
    constant = {"e": mpmath.e, "pi": mpmath.pi, "i": mpmath.mpc(0, 1)}.get(name)
    if constant is not None:
        return +constant
    if name == "inf":
        raise UnreadableError("infinity is no number")
    if name not in env:
        raise UnreadableError(f"{name} has no value")
    return env[name]


def _function(node: Node, args: list[Any]) -> Any:
    if node.value == "factorial":
        return _checked(args[0], 10_000) and mpmath.gamma(args[0] + 1)
    if node.value == "binom":
        if any(not _small(arg, 10_000) for arg in args):
            raise TooLargeError
        return mpmath.binomial(*args)
    function = _FUNCTIONS.get(node.value)
    if function is None:
        return _opaque(node, args)
    if node.value in ("exp", "sinh", "cosh", "tanh", "coth", "sech", "csch", "sin", "cos", "tan"):
        _checked(args[0], MOST_MAGNITUDE)
    return function(*args)


def _small(value: Any, limit: int) -> bool:
    return bool(abs(value) <= limit)


def _checked(value: Any, limit: int) -> bool:
    if not _small(value, limit):
        raise TooLargeError
    return True


def _rounded_power(base: Any, exponent: Any) -> Any:
    if base == 0:
        if mpmath.re(exponent) <= 0:
            raise UnreadableError("zero to no positive power")
        return mpmath.mpf(0)
    if abs(exponent) > 10**9 or abs(exponent) * (abs(mpmath.mag(base)) + 1) > MOST_MAGNITUDE:
        raise TooLargeError
    return mpmath.power(base, exponent)


def _root(radicand: Any, index: Any) -> Any:
    odd = isinstance(index, mpmath.mpf) and mpmath.isint(index) and int(index) % 2 == 1
    if odd and not isinstance(radicand, mpmath.mpc) and radicand < 0:
        return -_rounded_power(-radicand, 1 / index)
    return _rounded_power(radicand, 1 / index) if radicand != 0 else mpmath.mpf(0)


def _opaque(node: Node, args: list[Any]) -> Any:
    """What this module cannot compute: a number that is the same for the same arguments."""
    seed = f"{node.value}({', '.join(mpmath.nstr(arg, 20) for arg in args)})"
    return mpmath.mpf(random.Random(seed).uniform(0.3, 2.7))


def constant(node: Node, log_base: int | None = None) -> Any:
    """The value of an expression without variables."""
    with mpmath.workdps(DIGITS):
        return +evaluate(node, {}, log_base)


def close(first: Any, second: Any) -> bool:
    """Equal but for rounding."""
    with mpmath.workdps(DIGITS):
        if not (mpmath.isfinite(first) and mpmath.isfinite(second)):
            return False
        size = max(abs(first), abs(second))
        if first == 0 or second == 0:  # what cancels leaves the noise of rounding
            return bool(size <= mpmath.mpf(10) ** -(DIGITS - 5))
        return bool(abs(first - second) <= size * mpmath.mpf(10) ** (-DIGITS // 2))


def points(names: Sequence[str], whole: bool) -> list[dict[str, Any]]:
    """Values for variables, always the same: first positive ones, then of either sign; integers where asked for."""
    draw = random.Random("sample points" + ",".join(names))
    found = []
    with mpmath.workdps(DIGITS):
        for number in range(SAMPLES):
            if whole:
                found.append({name: mpmath.mpf(draw.randint(1, 5 + 2 * number)) for name in names})
            else:
                sign = 1 if number < SAMPLES // 2 else draw.choice((-1, 1))
                scale = (0.9, 3.1, 7.3)[number % 3]
                found.append({name: sign * mpmath.mpf(draw.random() * scale + 0.07) for name in names})
                if sign < 0 and len(names) > 1:
                    for name in names[1:]:
                        found[-1][name] *= draw.choice((-1, 1))
    return found


def needs_integers(node: Node) -> bool:
    """Whether an identity may hold for integers only: (-1)^n, floors, factorials."""
    if node.op == "func" and node.value in ("floor", "ceil", "factorial", "binom"):
        return bool(symbols(node))
    if node.op == "pow" and symbols(node.args[1]) and contains(node.args[0], "neg"):
        return True
    if node.op == "func" and node.value in ("sin", "cos", "tan") and symbols(node):
        return _has(node.args[0], "pi")
    return any(needs_integers(arg) for arg in node.args)


def _has(node: Node, name: str) -> bool:
    return (node.op == "sym" and node.value == name) or any(_has(arg, name) for arg in node.args)


def identical(first: Node, second: Node, log_base: int | None = None) -> bool:
    """Whether two expressions agree wherever both are defined, up to what sampling shows."""
    names = sorted(symbols(first) | symbols(second))
    if not names:
        return close(constant(first, log_base), constant(second, log_base))
    if _agree(first, second, names, False, log_base):
        return True
    whole = needs_integers(first) or needs_integers(second)
    return whole and _agree(first, second, names, True, log_base)


def _agree(first: Node, second: Node, names: list[str], whole: bool, log_base: int | None) -> bool:
    complex_numbers = _has(first, "i") or _has(second, "i")
    agreed = 0
    with mpmath.workdps(DIGITS):
        for env in points(names, whole):
            try:
                values = evaluate(first, env, log_base), evaluate(second, env, log_base)
            except (UnreadableError, TooLargeError, ZeroDivisionError, ValueError, OverflowError):
                continue
            if close(*values):
                agreed += 1
            elif complex_numbers or all(_real(value) for value in values):
                return False
    return agreed >= 3


def _real(value: Any) -> bool:
    return not isinstance(value, mpmath.mpc) or bool(abs(value.imag) <= abs(value) * mpmath.mpf(10) ** (-DIGITS // 2))
