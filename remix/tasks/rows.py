"""From the rows of a data set to prompts: which column is what, and which rows are held out."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal

from remix.config import HubTask, JsonlTask
from remix.config.block import nearest, quotable
from remix.types import Message, Prompt

Split = Literal["train", "test"]
Row = tuple[str, Mapping[str, Any]]
"""Where it stands, for messages ("problems.jsonl:17"), and its columns."""


def to_prompts(rows: Iterable[Row], config: JsonlTask | HubTask, task: str) -> list[Prompt]:
    """One prompt per row. Ids are those of the id column, or without one `task/row number`.

    Under `unanswered: drop` rows without an answer are left out; they keep their number.
    """
    prompts: list[Prompt] = []
    origins: dict[str, str] = {}
    for number, (where, row) in enumerate(rows):
        if config.unanswered == "drop" and is_empty(cell(row, "answer", config.answer, where)):
            continue
        # An id of 0 is one, an empty one is none.
        identity = f"{task}/{number}" if config.id is None else text(row, "id", config.id, where)
        if identity in origins:
            raise ValueError(
                f"{where}: the id '{quotable(identity)}' is also that of {origins[identity]}; "
                "make ids unique, or set `id: null` to number the rows"
            )
        origins[identity] = where
        content = _content(row, config.problem, where)
        solution = "" if config.solution is None else text(row, "solution", config.solution, where)
        images = images_of(row, None if isinstance(config, HubTask) else config.images, where)
        answer = text(row, "answer", config.answer, where)
        prompts.append(Prompt(identity, content, answer, task, images=images, solution=solution))
    return prompts


def cut(prompts: list[Prompt], share: float, split: Split) -> list[Prompt]:
    """The `share` that is held out (test), or the rest (train).

    A hash of the problem decides, so that a problem stays on its side whatever else the data set holds, and copies
    of it stay together. Where it has images, the file name of the first decides: all questions about it stay together.
    """
    return [prompt for prompt in prompts if (_hash(prompt) < share) == (split == "test")]


def problem_text(prompt: Prompt) -> str:
    """What is asked, without roles: the turns of a conversation one after the other."""
    if isinstance(prompt.content, str):
        return prompt.content
    return "\n".join(turn["content"] for turn in prompt.content)


def _hash(prompt: Prompt) -> float:
    """Uniform on [0, 1), from the first image's file name, or the text where there is none."""
    text = PurePath(prompt.images[0]).name if prompt.images else problem_text(prompt).strip()
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def cell(row: Mapping[str, Any], key: str, column: str, where: str) -> Any:
    """The column's cell as it is. Raises ValueError where there is no such column."""
    if column not in row:
        remedy = f"set `{key}` to the right one" + (", or to null to number the rows" if key == "id" else "")
        raise ValueError(
            f"{where}: no column '{column}' among {quotable(', '.join(map(repr, row)))}; "
            f"{quotable(nearest(column, row))} {remedy}"
        )
    return row[column]


def text(row: Mapping[str, Any], key: str, column: str, where: str) -> str:
    """The column's cell as text; `key` is the setting that names the column, for messages."""
    value = cell(row, key, column, where)
    if isinstance(value, str) and value.strip() and _is_text(value):
        return value
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    found = "empty" if is_empty(value) else f"a {type(value).__name__}, not text"
    if isinstance(value, float):
        found = "no finite number"
    elif isinstance(value, str) and not _is_text(value):
        found = "not text: it holds half of a surrogate pair"
    raise ValueError(
        f"{where}: the {key} (column '{column}') is {found}; remove the row or set `{key}` to another column"
    )


def is_empty(value: Any) -> bool:
    """Nothing, or nothing but spaces."""
    return value is None or (isinstance(value, str) and not value.strip())


def _content(row: Mapping[str, Any], column: str, where: str) -> str | tuple[Message, ...]:
    """A text, or a conversation: a list of {"role": ..., "content": ...}."""
    value = cell(row, "problem", column, where)
    if isinstance(value, list) and value and all(_is_turn(turn) for turn in value):
        return tuple({"role": turn["role"], "content": turn["content"]} for turn in value)
    return text(row, "problem", column, where)


def images_of(row: Mapping[str, Any], column: str | None, where: str) -> tuple[str, ...]:
    """Paths, as they are opened from the working directory; none without a column of them. They are relative to the
    file, and lead nowhere else."""
    if column is None:
        return ()
    found = cell(row, "images", column, where)
    paths = [] if is_empty(found) else found if isinstance(found, list) else [found]
    odd = next((path for path in paths if not isinstance(path, str) or not path.strip()), None)
    if odd is not None:
        raise ValueError(
            f"{where}: the images (column '{column}') hold {quotable(repr(odd))}, which is no path; write one "
            "path, or a list of them"
        )
    folder = Path(where.rpartition(":")[0]).parent
    return tuple(image_in(folder, path, where) for path in paths)


def image_in(folder: Path, name: Any, where: str) -> str:
    """The path of an image that an annotation names, which never leads out of the folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where}: {quotable(repr(name))} is no image's path; name a file in the folder of images")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise ValueError(
            f"{where}: the image path '{quotable(name)}' leads out of the folder of images, {folder}; "
            "paths are relative to it, without '..'"
        )
    path = folder / relative
    if not os.path.isfile(path):
        raise ValueError(f"{where}: no image {quotable(str(path))}; set the folder of images, or remove the annotation")
    return str(path)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(
        isinstance(turn.get(key), str) and _is_text(turn[key]) for key in ("role", "content")
    )


def _is_text(value: str) -> bool:
    r"""Whether it can be encoded: "\ud800", which JSON can write, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
