"""From a cleaned text to tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

from remix.rewards.answers.nodes import UnreadableError
from remix.rewards.answers.units import is_unit_word


class Token(NamedTuple):
    kind: str
    """num, name, func, text, sep, cmd, op, dots."""
    text: str


FUNCTIONS = [
    "arcsinh",
    "arccosh",
    "arctanh",
    "arcsin",
    "arccos",
    "arctan",
    "arccot",
    "arcsec",
    "arccsc",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "coth",
    "sech",
    "csch",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "exp",
    "log",
    "ln",
    "lg",
    "sqrt",
    "cbrt",
    "floor",
    "ceil",
    "gcd",
    "lcm",
    "max",
    "min",
    "sgn",
    "sign",
    "det",
    "abs",
    "Re",
    "Im",
    "arg",
]
_FUNCTION_SET = frozenset(FUNCTIONS)
_FUNCTION_PREFIX = re.compile("(" + "|".join(FUNCTIONS[:24]) + ")")
GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "omicron",
        "rho",
        "varrho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Pi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
        "hbar",
        "ell",
        "partial",
        "nabla",
        "prime",
        "odot",
        "oplus",
        "star",
        "top",
        "perp",
        "infty",
        "emptyset",
        "varnothing",
        "angle",
        "triangle",
        "square",
        "aleph",
    ]
)
_ALIASES = {
    "leq": "le", "leqslant": "le", "lt": "<", "gt": ">", "geq": "ge", "geqslant": "ge", "neq": "ne", "dfrac": "frac",
    "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "simeq": "approx", "cong": "approx",
    "vert": "|", "lvert": "|", "rvert": "|", "mid": "|", "Vert": "|", "lVert": "|", "rVert": "|", "ast": "*",
    "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "lor": "or", "vee": "or", "land": "and",
    "wedge": "and", "backslash": "setminus", "varnothing": "emptyset", "varphi": "phi", "varepsilon": "epsilon",
    "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "div": "/", "colon": ":", "bigcup": "cup",
}  # fmt: skip
_TOKEN = re.compile(
    r"(?P<num>\d+(?:\.(?!\.)\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|(?P<cmd>\\(?:[A-Za-z]+|.))"
    r"|(?P<word>[A-Za-z]+)|(?P<dots>\.\.\.+)|(?P<op><=|>=|!=|==|=<|[^\s])"
)
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
MOST_TOKENS = 1_000


def tokenize(text: str) -> list[Token]:
    tokens: list[Token] = []
    position = 0
    while (match := _TOKEN.search(text, position)) is not None:
        position = match.end()
        kind, piece = str(match.lastgroup), match.group()
        if kind == "word":
            tokens += _word(piece)
        elif kind == "cmd":
            name = piece[1:]
            if name in ("text", "exact", "begin", "end", "mathbb"):
                content, position = braced(text, position)
                tokens += _content(name, content, tokens)
            else:
                tokens += _command(name)
        else:
            tokens.append(Token(kind, {"<=": "le", ">=": "ge", "!=": "ne", "==": "=", "=<": "le"}.get(piece, piece)))
        if len(tokens) > MOST_TOKENS:
            raise UnreadableError("too long")
    return tokens


def braced(text: str, position: int) -> tuple[str, int]:
    """What the braces at a position hold, and where they end."""
    opening = re.compile(r"\s?\{").match(text, position)
    if opening is None:
        raise UnreadableError("no braces")
    depth, start = 1, opening.end()
    for index in range(start, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if not depth:
                return text[start:index], index + 1
    raise UnreadableError("braces that do not close")


def _command(name: str) -> list[Token]:
    name = _ALIASES.get(name, name)
    if name in ("and", "or"):
        return [Token("sep", name)]
    if name in ("pi", "e", "i"):
        return [Token("name", name)]
    if name == "infty":
        return [Token("name", "inf")]
    if name in ("{", "}"):
        return [Token("op", "\\" + name)]
    if name in _FUNCTION_SET:
        return [Token("func", name)]
    if name in GREEK and name != "emptyset":
        return [Token("name", name)]
    if name == "ldots":
        return [Token("dots", "...")]
    if name in ("<", ">", "|", "[", "]", "/", "*", ":"):
        return [Token("op", name)]
    if name in ("%", "degree"):
        return [Token("op", "%" if name == "%" else "degree")]
    if name in ("le", "ge", "ne", "approx", "in", "cup", "cap", "setminus", "pm", "mp", "equiv", "sim"):
        return [Token("op", name)]
    if name in ("times", "cdot"):
        return [Token("op", "*")]
    if name == " ":
        return []
    return [Token("cmd", name)]


def _word(word: str) -> list[Token]:
    """A run of bare letters: a function, a unit, a word, or variables one after the other."""
    if word in ("and", "or", "And", "Or"):
        return [Token("sep", word.lower())]
    if word in _FUNCTION_SET:
        return [Token("func", word)]
    if word in ("pi", "Pi", "PI"):
        return [Token("name", "pi")]
    if word in ("infty", "infinity", "inf", "Infinity", "oo"):
        return [Token("name", "inf")]
    if len(word) == 1:
        return [Token("name", word)]
    if is_unit_word(word):
        return [Token("text", word)]
    prefix = _FUNCTION_PREFIX.match(word)
    if prefix is not None and len(word) - prefix.end() <= 2:
        return [Token("func", prefix.group()), *_word(word[prefix.end() :])]
    if word.startswith("pi") and len(word) == 3:
        return [Token("name", "pi"), Token("name", word[2])]
    if word.lower() in ("or", "theta", "alpha", "beta", "lambda", "omega", "phi", "gamma", "delta", "sigma", "hbar"):
        return [Token("name", word.lower())]
    if (len(word) >= 3 and word[1:].islower() and re.search("[aeiouyAEIOUY]", word) and not word.startswith("dd")) and (
        len(word) > 3
        or word.lower() in ("yes", "odd", "not", "may", "men", "day", "one", "two", "six", "ten", "she", "he")
    ):
        return [Token("text", word)]
    return [Token("name", letter) for letter in word]


def _content(command: str, content: str, before: list[Token]) -> list[Token]:
    content = content.strip()
    if command in ("exact", "begin", "end"):
        return [Token(command, content)]
    if command == "mathbb":
        return [Token("name", f"mathbb {content}")]
    after_number = bool(before) and (
        before[-1].kind in ("num", "exact", "name") or before[-1].text in ("}", ")", "\\}", "%")
    )
    lowered = content.lower().strip(" ,.;:")
    if lowered in ("and", "or"):
        return [Token("sep", lowered)]
    if lowered in ("", "quad") or content in (",", ";", ":"):
        return [Token("op", content)] if content in (",", ";", ":") else []
    if re.search(r"\d|\\|[$=+]", content):
        return tokenize(content)
    choice = _CHOICE.fullmatch(content)
    if choice is not None and not after_number:
        return [Token("name", choice.group(1))]
    if re.search(r"\b(?:and|or)\b|,", content) and not after_number:
        return tokenize(content)
    return [Token("text", content)]
