"""Text from outside (models, data sets, libraries' errors) on its way to a terminal, a log or a page."""

from __future__ import annotations

import argparse
import html
import re
import sys
import traceback
from types import TracebackType
from typing import NoReturn

from remix.secrets import redact

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, links
    r"|[\x1b\x9b]\[?[0-?]*[ -/]*[@-~]"  # colours, cursor movements
)
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # they turn the writing direction of what follows
    "\ud800-\udfff]"  # halves of characters, which no terminal can be sent
)


def printable(text: str) -> str:
    """Text from a model, safe to show: it can move no cursor, change no colour, hide nothing."""
    return _INVISIBLE.sub("", _ESCAPES.sub("", text))


def showable(text: object) -> str:
    """Safe to show, and free of credentials."""
    return printable(redact(str(text)))


def markdown_text(text: str) -> str:
    """Shown by Markdown as it stands: no HTML, on one line."""
    return " ".join(html.escape(showable(text), quote=False).split())


def markdown_code(text: str) -> str:
    """As code in a line of Markdown, in which neither HTML nor Markdown counts."""
    text = " ".join(showable(text).split("\n"))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def print_error(text: object) -> None:
    """A line on standard error for what went wrong; whatever the text quotes, it is safe to show."""
    print(f"error: {showable(text)}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Its errors quote the words that it was given."""

    def error(self, message: str) -> NoReturn:
        super().error(showable(message))


def guard_tracebacks() -> None:
    """From here on, the trace of an error that nobody catches is safe to show too."""
    sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(showable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
