"""From the rows of a data set to prompts: which column is what, and which rows are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from remix.config import HubTask, JsonlTask
from remix.config.block import nearest
from remix.types import Message, Prompt

Split = Literal["train", "test"]
Row = tuple[str, Mapping[str, Any]]
"""Where it stands, for messages ("problems.jsonl:17"), and its columns."""


def to_prompts(rows: Iterable[Row], config: JsonlTask | HubTask, task: str) -> list[Prompt]:
    """One prompt per row. Ids are those of the id column, or without one `task/row number`."""
    prompts: list[Prompt] = []
    origins: dict[str, str] = {}
    for number, (where, row) in enumerate(rows):
        # An id of 0 is one, an empty one is none.
        identity = f"{task}/{number}" if config.id is None else _text(row, "id", config.id, where)
        if identity in origins:
            raise ValueError(
                f"{where}: the id '{identity}' is also that of {origins[identity]}; "
                "make ids unique, or set `id: null` to number the rows"
            )
        origins[identity] = where
        content = _content(row, config.problem, where)
        prompts.append(Prompt(identity, content, _text(row, "answer", config.answer, where), task))
    return prompts


def cut(prompts: list[Prompt], share: float, split: Split) -> list[Prompt]:
    """The `share` that is held out (test), or the rest (train).

    A hash of the problem decides, so that a problem stays on its side whatever else the data set holds, and copies
    of it stay together.
    """
    return [prompt for prompt in prompts if (_hash(prompt) < share) == (split == "test")]


def _hash(prompt: Prompt) -> float:
    """Uniform on [0, 1), from the text alone."""
    text = prompt.content if isinstance(prompt.content, str) else "\n".join(turn["content"] for turn in prompt.content)
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:6]) / 2**48


def _cell(row: Mapping[str, Any], key: str, column: str, where: str) -> Any:
    if column not in row:
        remedy = f"set `{key}` to the right one" + (", or to null to number the rows" if key == "id" else "")
        raise ValueError(
            f"{where}: no column '{column}' among {', '.join(map(repr, row))}; {nearest(column, row)} {remedy}"
        )
    return row[column]


def _text(row: Mapping[str, Any], key: str, column: str, where: str) -> str:
    cell = _cell(row, key, column, where)
    if isinstance(cell, str) and cell.strip():
        return cell
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return str(cell)
    found = "empty" if cell is None or cell == "" or isinstance(cell, str) else f"a {type(cell).__name__}, not text"
    raise ValueError(
        f"{where}: the {key} (column '{column}') is {found}; remove the row or set `{key}` to another column"
    )


def _content(row: Mapping[str, Any], column: str, where: str) -> str | tuple[Message, ...]:
    """A text, or a conversation: a list of {"role": ..., "content": ...}."""
    cell = _cell(row, "problem", column, where)
    if isinstance(cell, list) and cell and all(_is_turn(turn) for turn in cell):
        return tuple({"role": turn["role"], "content": turn["content"]} for turn in cell)
    return _text(row, "problem", column, where)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
