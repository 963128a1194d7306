"""From tokens to a tree: mathematics as models write it, LaTeX and plain notation mixed.

What is not understood raises `UnreadableError`; nothing is evaluated here, so that 9^{9^{9^9}} costs nothing.
"""

from __future__ import annotations

from remix.rewards.answers.cursor import MOST_DEPTH
from remix.rewards.answers.lex import Token, tokenize
from remix.rewards.answers.nodes import Node, UnreadableError
from remix.rewards.answers.primaries import ACCENTS, Primaries, mixed

_RELATIONS = frozenset({"=", "<", ">", "le", "ge", "ne", "approx", "in", "equiv", "sim"})


def parse(text: str) -> Node:
    parser = _Parser(tokenize(text))
    node = parser.listing()
    parser.expect_end()
    return node


class _Parser(Primaries):
    """From what binds least to what binds most."""

    def listing(self) -> Node:
        """Items separated by commas, semicolons, "and", "or"; a single item is itself. Semicolons bind least."""
        items, separator = [self._comma_list()], ""
        while self._take(";"):
            separator = ";"
            if self._closes():
                break
            items.append(self._comma_list())
        return Node("list", tuple(items), separator) if len(items) > 1 else items[0]

    def _comma_list(self) -> Node:
        items, separator = [self._item()], ","
        while True:
            took = self._take(",")
            if self._peek().kind == "sep":
                separator, took = self._next().text, True
                self._take(",")
            if not took:
                break
            if self._closes() or self._is(";"):  # a comma at the end
                break
            items.append(self._item())
        return Node("list", tuple(items), separator) if len(items) > 1 else items[0]

    def _item(self) -> Node:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise UnreadableError("nested too deeply")
        outer, self._unit = self._unit, []
        node = self._relation()
        if self._unit:
            node = _with_unit(node, " ".join(self._unit))
        self._unit = outer
        self._depth -= 1
        return node

    def _relation(self) -> Node:
        sides, relations = [self._set_expression()], []
        while self._peek().kind == "op" and self._peek().text in _RELATIONS:
            relations.append(self._next().text)
            sides.append(self._set_expression())
        return Node("rel", tuple(sides), tuple(relations)) if relations else sides[0]

    def _set_expression(self) -> Node:
        node = self._ratio()
        while True:
            bare_u = self._peek() == Token("name", "U") and node.op in ("group", "union", "set")
            if bare_u or self._is("cup", "cap", "setminus"):
                op = {"cup": "union", "U": "union", "cap": "inter", "setminus": "minus"}[self._next().text]
                right = self._ratio()
                merged = (*node.args, right) if node.op == op == "union" else (node, right)
                node = Node(op, merged)
            else:
                return node

    def _ratio(self) -> Node:
        parts = [self._sum()]
        while self._take(":"):
            parts.append(self._sum())
        return Node("ratio", tuple(parts)) if len(parts) > 1 else parts[0]

    # --- arithmetic ---

    def _sum(self) -> Node:
        terms = [self._signed()]
        while True:
            if self._take("+"):
                terms.append(self._signed())
            elif self._take("-"):
                terms.append(Node("neg", (self._signed(),)))
            elif self._is("pm", "mp"):
                sign = self._next().text
                terms = [Node("pm", (_sum_of(terms), self._signed()), sign)]
            else:
                return _sum_of(terms)

    def _signed(self) -> Node:
        if self._take("+"):
            return self._signed()
        if self._take("-"):
            return Node("neg", (self._signed(),))
        if self._is("pm", "mp"):
            sign = self._next().text
            return Node("pm", (self._signed(),), sign)
        return self._product()

    def _product(self) -> Node:
        node = self._factor()
        while True:
            if self._take("*"):
                node = Node("mul", (node, self._signed_factor()))
            elif self._take("/"):
                if self._peek().kind == "text" and self._unit:
                    self._unit.append("/")
                    self._units()
                    continue
                node = Node("div", (node, self._signed_factor()))
            elif self._peek().kind == "text":
                self._units()
            elif self._starts_factor():
                right = self._factor()
                if (
                    right.op in ("num", "dec")
                    and self._tokens[self._at - 1].kind == "num"
                    and node.op in ("num", "dec")
                ):
                    raise UnreadableError("two numerals side by side")
                node = mixed(node, right) or Node("mul", (node, right))
            else:
                return node
            if node.op in ("mul", "div") and "matrix" in (node.args[0].op, node.args[-1].op):
                raise UnreadableError("arithmetic of matrices")

    def _units(self) -> None:
        """Words behind a number, with their powers and slashes."""
        while True:
            if self._peek().kind == "text":
                self._unit.append(self._next().text)
            elif self._is("^") and self._unit:
                self._at += 1
                self._unit.append("^" + self._raw_argument())
            elif self._is("/", "*") and self._unit and self._peek(1).kind in ("text", "name"):
                self._unit.append(self._next().text)
                self._unit.append(self._next().text)
            else:
                return

    def _signed_factor(self) -> Node:
        if self._take("-"):
            return Node("neg", (self._signed_factor(),))
        if self._take("+"):
            return self._signed_factor()
        return self._factor()

    def _starts_factor(self) -> bool:
        token = self._peek()
        if token.kind in ("num", "func", "exact", "begin"):
            return True
        if token.kind == "name":
            return not (token.text == "U" and self._peek(1).text in ("(", "[", "\\{"))
        if token.kind == "cmd":
            return (
                token.text in ("frac", "sqrt", "binom", "lfloor", "lceil", "langle", "emptyset")
                or token.text in ACCENTS
            )
        if token.kind == "op":
            return token.text in ("(", "{", "[", "\\{") or (token.text == "|" and not self._bars)
        return False

    def _factor(self) -> Node:
        node = self._postfix(self._primary())
        if self._take("^"):
            exponent = self._exponent()
            if node.op == "sym" and self._take("_"):  # v^2_0
                node = Node("sym", value=f"{node.value}_{self._raw_argument()}")
            node = self._postfix(Node("pow", (node, exponent)))
        return node

    def _exponent(self) -> Node:
        if self._take("-"):
            return Node("neg", (self._exponent(),))
        if self._take("+"):
            return self._exponent()
        node = self._postfix(self._primary())
        return Node("pow", (node, self._exponent())) if self._take("^") else node

    def _postfix(self, node: Node) -> Node:
        while True:
            if self._take("!"):
                node = Node("func", (node,), "factorial")
            elif self._take("%"):
                node = Node("percent", (node,))
            elif self._take("degree"):
                node = Node("degree", (node,))
            else:
                return node


def _sum_of(terms: list[Node]) -> Node:
    if len(terms) > 1 and any(term.op == "matrix" for term in terms):
        raise UnreadableError("arithmetic of matrices")
    return terms[0] if len(terms) == 1 else Node("add", tuple(terms))


def _with_unit(node: Node, unit: str) -> Node:
    if node.op == "rel":  # x = 5 cm
        return Node("rel", (*node.args[:-1], Node("quantity", (node.args[-1],), unit)), node.value)
    return Node("quantity", (node,), unit)
