"""What stands alone in an expression: numbers, names, brackets, fractions, roots, functions, matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction

from remix.rewards.answers.cursor import MOST_DEPTH, Cursor
from remix.rewards.answers.lex import Token
from remix.rewards.answers.nodes import Literal, Node, UnreadableError, integer

LONGEST_NUMERAL = 4_000

ACCENTS = frozenset(
    {"overline", "bar", "hat", "widehat", "tilde", "widetilde", "dot", "ddot", "overbrace", "underbrace"}
)
_MATRICES = dict.fromkeys(("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"), "matrix")
_MATRICES |= {"vmatrix": "det"}


class Primaries(Cursor, ABC):
    """What it takes to read brackets is defined by the parser proper."""

    @abstractmethod
    def listing(self) -> Node: ...

    @abstractmethod
    def _set_expression(self) -> Node: ...

    @abstractmethod
    def _sum(self) -> Node: ...

    @abstractmethod
    def _factor(self) -> Node: ...

    @abstractmethod
    def _signed_factor(self) -> Node: ...

    @abstractmethod
    def _starts_factor(self) -> bool: ...

    @abstractmethod
    def _exponent(self) -> Node: ...

    @abstractmethod
    def _postfix(self, node: Node) -> Node: ...

    def _primary(self) -> Node:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise UnreadableError("nested too deeply")
        node = self._unnested()
        self._depth -= 1
        return node

    def _unnested(self) -> Node:
        token = self._next()
        if token.kind == "num":
            return self._mixed_in_plain(_numeral(token.text))
        if token.kind == "exact":
            above, _, below = token.text.partition("/")
            return Node("num", value=Fraction(int(above), int(below)))
        if token.kind == "name":
            return self._name(token.text)
        if token.kind == "func":
            return self._function(token.text)
        if token.kind == "text":
            words = [token.text]
            while self._peek().kind == "text":
                words.append(self._next().text)
            if self._unit or self._starts_factor():  # "\text{dollars} 5" is money, other words before a number are not
                if words == ["dollars"] or words[0] in ("euros", "yen", "rupees", "pounds sterling"):
                    self._unit += words
                    return self._factor()
                raise UnreadableError("words before mathematics")
            return Node("text", value=" ".join(words))
        if token.kind == "dots":
            return Node("dots")
        if token.kind == "begin":
            return self._matrix(token.text)
        handler = self._brackets().get(token.text) if token.kind in ("op", "cmd") else None
        if handler is None:
            raise UnreadableError(f"{token.text!r}")
        return handler(token.text)

    def _brackets(self) -> dict[str, Callable[[str], Node]]:
        table: dict[str, Callable[[str], Node]] = dict.fromkeys(("(", "[", "langle"), self._group)
        table |= {"{": self._braces, "\\{": self._set, "|": self._absolute, "emptyset": lambda _: Node("set")}
        table |= {"frac": self._fraction, "sqrt": self._root, "binom": self._binomial}
        table |= {"lfloor": self._rounding, "lceil": self._rounding}
        return table | dict.fromkeys(ACCENTS, self._accent)

    def _group(self, opening: str) -> Node:
        bars, self._bars = self._bars, 0
        inner = self.listing()
        self._bars = bars
        closing = self._expect(")", "]", "rangle")
        if inner.op != "list":
            if (opening, closing) in (("(", "]"), ("[", ")")):
                raise UnreadableError("brackets that do not match")
            return inner
        brackets = "()" if opening == "langle" else opening + closing
        return Node("group", inner.args, brackets)

    def _braces(self, _: str) -> Node:
        bars, self._bars = self._bars, 0
        inner = self.listing()
        self._bars = bars
        self._expect("}")
        return inner

    def _set(self, _: str) -> Node:
        if self._take("\\}"):
            return Node("set")
        bars, self._bars = self._bars, 1
        inner = self.listing()
        self._bars = bars
        if (inner.op == "ratio" and len(inner.args) == 2) or self._take("|"):  # {x : x > 2}, {x | x > 2}
            condition = self.listing() if inner.op != "ratio" else inner.args[1]
            self._expect("\\}")
            return condition
        if inner.op == "rel" and inner.args[0].op == "ratio":
            first = inner.args[0].args[-1]
            self._expect("\\}")
            return Node("rel", (first, *inner.args[1:]), inner.value)
        self._expect("\\}")
        return Node("set", inner.args if inner.op == "list" else (inner,))

    def _absolute(self, _: str) -> Node:
        self._bars += 1
        inner = self._sum()
        self._bars -= 1
        self._expect("|")
        return Node("func", (inner,), "abs")

    def _rounding(self, opening: str) -> Node:
        inner = self._sum()
        self._expect("rfloor" if opening == "lfloor" else "rceil")
        return Node("func", (inner,), "floor" if opening == "lfloor" else "ceil")

    def _fraction(self, _: str) -> Node:
        above = self._argument()
        return Node("div", (above, self._argument()))

    def _binomial(self, _: str) -> Node:
        above = self._argument()
        return Node("func", (above, self._argument()), "binom")

    def _root(self, _: str) -> Node:
        index = integer(2)
        if self._take("["):
            index = self._sum()
            self._expect("]")
        return Node("root", (self._argument(), index))

    def _accent(self, name: str) -> Node:
        return Node("sym", value=f"{name} {self._raw_argument()}")

    def _argument(self) -> Node:
        """As TeX reads it: braces, or a single digit or symbol."""
        token = self._peek()
        if token.kind == "num" and len(token.text) > 1 and token.text.isdigit():
            self._tokens[self._at] = Token("num", token.text[1:])
            return integer(int(token.text[0]))
        return self._primary()

    def _name(self, name: str) -> Node:
        while True:
            if self._take("_"):
                name += "_" + self._raw_argument()
            elif self._take("'"):
                name += "'"
            elif self._is("^") and self._peek(1).text == "prime":
                self._at += 2
                name += "'"
            elif self._is("^") and [self._peek(n).text for n in (1, 2, 3)] == ["{", "prime", "}"]:
                self._at += 4
                name += "'"
            else:
                break
        if self._is("(") and (name[0] in "fghFGHPQRTW" or "'" in name) and not name[0].isdigit():
            self._at += 1
            inner = self._group("(")
            return Node("call", inner.args if inner.op == "group" else (inner,), name)
        return Node("sym", value=name)

    def _function(self, name: str) -> Node:
        if name in ("sqrt", "cbrt"):
            if name == "sqrt" and self._is("["):
                return self._root(name)
            return Node("root", (self._argument(), integer(2 if name == "sqrt" else 3)))
        base = None
        power = None
        for _ in range(2):
            if self._take("_"):
                base = self._argument()
            elif self._take("^"):
                power = self._exponent()
        arg = self._function_argument()
        if name in ("log", "lg"):
            node = Node("log", (arg, base) if base else (arg, integer(10)) if name == "lg" else (arg,))
        elif power is not None and power == Node("neg", (integer(1),)):
            return Node("func", (arg,), "arc" + name)
        else:
            args = arg.args if arg.op in ("group", "list") else (arg,)
            node = Node("func", args, {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}.get(name, name))
        return Node("pow", (node, power)) if power is not None else node

    def _function_argument(self) -> Node:
        """Brackets alone, or a product up to the next function, as in \\sin 2x \\cos y."""
        if self._is("(", "{", "[", "|"):
            node = self._postfix(self._primary())
            return Node("pow", (node, self._exponent())) if self._is("^") and False else node
        node = self._signed_factor()
        while self._starts_factor() and self._peek().kind != "func" and not self._is("(", "[", "\\{"):
            right = self._factor()
            node = mixed(node, right) or Node("mul", (node, right))
        return node

    def _mixed_in_plain(self, node: Node) -> Node:
        """1 9/10, with a space."""
        after = [self._peek(n) for n in range(3)]
        if node.op == "num" and [t.kind for t in after] == ["num", "op", "num"] and after[1].text == "/":
            if after[0].text.isdigit() and after[2].text.isdigit() and int(after[0].text) < int(after[2].text):
                self._at += 3
                return Node("num", value=node.value + Fraction(int(after[0].text), int(after[2].text)))
            raise UnreadableError("two numerals side by side")
        return node

    def _matrix(self, name: str) -> Node:
        if name not in _MATRICES:
            raise UnreadableError(name)
        if name == "array" and self._is("{"):
            self._raw_argument()
        rows: list[Node] = []
        cells: list[Node] = []
        while True:
            token = self._peek()
            if token.kind == "end":
                self._at += 1
                break
            if self._take("hline"):
                continue
            if self._take("\\"):
                rows.append(Node("list", tuple(cells)))
                cells = []
                continue
            if not self._take("&") and cells:
                raise UnreadableError("cells side by side")
            cells.append(self._set_expression())
        if cells:
            rows.append(Node("list", tuple(cells)))
        if not rows or len({len(row.args) for row in rows}) != 1:
            raise UnreadableError("not a matrix")
        return Node("matrix", tuple(rows), _MATRICES[name])


def _numeral(text: str) -> Node:
    if len(text) > LONGEST_NUMERAL:
        raise UnreadableError("a numeral too long")
    mantissa, _, exponent = text.lower().partition("e")
    whole, point, part = mantissa.partition(".")
    if exponent:
        if abs(int(exponent)) > LONGEST_NUMERAL:
            raise UnreadableError("an exponent too large")
        value = Fraction(mantissa + ("0" if mantissa.endswith(".") else "")) * Fraction(10) ** int(exponent)
        return Node("num", value=value)
    if not point or not part:
        return integer(int(whole))
    digits = (whole + part).lstrip("0")
    return Node("dec", value=Literal(Fraction(f"{whole or 0}.{part}"), len(part), len(digits)))


def mixed(left: Node, right: Node) -> Node | None:
    r"""1\frac{9}{10}: an integer before a proper fraction of integers."""
    if left.op != "num" or right.op != "div" or any(arg.op != "num" for arg in right.args):
        return None
    above, below = (arg.value for arg in right.args)
    if any(value.denominator != 1 for value in (left.value, above, below)) or not 0 < above < below:
        return None
    return Node("num", value=left.value + above / below)
