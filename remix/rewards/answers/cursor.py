"""A place in a row of tokens, and how far the parser is nested there."""

from __future__ import annotations

from remix.rewards.answers.lex import Token
from remix.rewards.answers.nodes import UnreadableError

MOST_DEPTH = 40

END = Token("end of text", "")


class Cursor:
    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0
        self._bars = 0
        self._unit: list[str] = []

    def _peek(self, ahead: int = 0) -> Token:
        position = self._at + ahead
        return self._tokens[position] if position < len(self._tokens) else END

    def _next(self) -> Token:
        token = self._peek()
        self._at += 1
        return token

    def _is(self, *texts: str) -> bool:
        token = self._peek()
        return token.kind in ("op", "cmd") and token.text in texts

    def _take(self, *texts: str) -> bool:
        if self._is(*texts):
            self._at += 1
            return True
        return False

    def _expect(self, *texts: str) -> str:
        token = self._next()
        if token.kind not in ("op", "cmd") or token.text not in texts:
            raise UnreadableError(f"{token.text!r} instead of {texts}")
        return token.text

    def expect_end(self) -> None:
        if self._peek() is not END:
            raise UnreadableError(f"{self._peek().text!r} is left over")

    def _closes(self) -> bool:
        return self._peek() is END or self._is(")", "]", "\\}", "}", "rangle")

    def _raw_argument(self) -> str:
        """A subscript, power of a unit or accented letter as text; what is nested in it stays flat."""
        if not self._take("{"):
            return self._next().text
        depth, pieces = 1, []
        while depth:
            token = self._next()
            if token is END:
                raise UnreadableError("braces that do not close")
            depth += {"{": 1, "}": -1}.get(token.text if token.kind == "op" else "", 0)
            if depth and token.text not in ("{", "}"):
                pieces.append(token.text.replace(" ", ""))
        return "".join(pieces)
