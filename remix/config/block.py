"""What every block of a recipe is made of.

`type:` selects a small block that owns only its keys; class defaults are the vetted setting; an unknown key fails
and names the nearest valid one. Every default that the paper leaves open is a key here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

LARGEST_NUMBER = 2**63
"""What is not below it, in size, is a slip, and makes infinities and overflows of what is computed from it."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


LONGEST_LINE = 500
"""Characters of a line of a message."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest valid one, or all of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(valid)}"


def quotable(line: str) -> str:
    """For a message: what is long without its middle, what a terminal cannot show as its code."""
    short = line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short)


class Block(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    name = quotable(str(key))
                    raise ValueError(f"unknown key '{name}'; {nearest(name, cls.model_fields)}")
        return data

    @model_validator(mode="after")
    def _countable_numbers(self) -> Self:
        for key, value in self:
            if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:  # nan is below nothing
                raise ValueError(f"'{key}' has to be a number below 2^63")
        return self
