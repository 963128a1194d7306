"""A run as its files tell it while they grow: every byte is fetched once, from a folder here or on another machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from remix.config.block import LARGEST_NUMBER
from remix.config.reading import read_yaml
from remix.tracking.run_log import parse_row

METRICS, COMPLETIONS, RECIPE, RESULT = "metrics.jsonl", "completions.jsonl", "recipe.yaml", "result.json"
MOST_BYTES = {METRICS: 1 << 26, COMPLETIONS: 1 << 18, RECIPE: 1 << 18, RESULT: 1 << 18}
"""Of a file's end, where more than that was there before it was first looked at."""


class Piece(NamedTuple):
    """What a file holds from a place on."""

    identity: str
    """Another one where the file was replaced by a new one of its name."""
    start: int
    """Bytes of the file before `data`."""
    data: bytes
    age: float
    """Seconds since the file was last written, by the clock of the machine that has it."""


class Folder(Protocol):
    """Where a run lies. Raises OSError where it cannot be read."""

    name: str

    def fetch(self, name: str, identity: str, offset: int, most: int) -> Piece | None:
        """The file from `offset` on if it is still the one of this identity and no shorter, else its last `most`
        bytes; None where there is no such file."""


class LocalFolder:
    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder; name the run_dir of a run, or user@host:/path of one elsewhere")
        self.name, self._path = str(path), path

    def fetch(self, name: str, identity: str, offset: int, most: int) -> Piece | None:
        try:
            with (self._path / name).open("rb") as file:
                about = os.fstat(file.fileno())
                goes_on = str(about.st_ino) == identity and about.st_size >= offset
                start = offset if goes_on else max(about.st_size - most, 0)
                file.seek(start)
                return Piece(str(about.st_ino), start, file.read(), max(time.time() - about.st_mtime, 0.0))
        except FileNotFoundError:
            return None


class Tail:
    """The bytes of one file so far, or of its end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.age: float | None = None
        """None where there is no such file."""
        self._forget("")

    def _forget(self, identity: str, offset: int = 0) -> None:
        self.data, self._identity, self._offset = b"", identity, offset

    def poll(self, folder: Folder) -> None:
        piece = folder.fetch(self.name, self._identity, self._offset, MOST_BYTES[Path(self.name).name])
        if piece is None:
            self.age = None
            self._forget("")
            return
        if (piece.identity, piece.start) != (self._identity, self._offset):
            self._forget(piece.identity, piece.start)
        self.age, self._offset = piece.age, piece.start + len(piece.data)
        self.data += piece.data


class Rows(Tail):
    """Whole lines of JSON; the last one may still be half there, and the first one no longer."""

    def _forget(self, identity: str, offset: int = 0) -> None:
        super()._forget(identity, offset)
        self.rows: list[dict[str, Any]] = []
        self.unreadable = 0
        """Lines that are no JSON object with a step. Whoever only looks on goes on without them."""
        self._inside = offset > 0

    def poll(self, folder: Folder) -> None:
        super().poll(folder)
        *lines, self.data = self.data.split(b"\n")
        if lines and self._inside:
            self._inside = False
            lines = lines[1:]
        for line in lines:
            try:
                row = parse_row(line, self.name)
                if not 0 <= row["step"] < LARGEST_NUMBER:
                    raise ValueError("no step that a run can have")
                self.rows.append(row)
            except ValueError:
                self.unreadable += 1


@dataclass(frozen=True)
class RunState:
    """What is known of a run at a moment."""

    place: str
    recipe: Mapping[str, Any]
    """Plain data, unchecked; {} where there is none."""
    rows: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl."""
    completion: Mapping[str, Any] | None
    """The last line of completions.jsonl."""
    result: Mapping[str, Any] | None
    age: float
    """Seconds since metrics.jsonl, or before its first line the recipe, was written."""
    task: str = ""
    """Which one, in a run of tasks one after the other."""
    unreadable: int = 0
    seen: float = field(default_factory=time.monotonic)

    @property
    def silence(self) -> float:
        """Seconds since anything was written, now."""
        return self.age + time.monotonic() - self.seen

    @property
    def last_step(self) -> int | None:
        """Steps that the run is going to have done."""
        limits = [self.recipe.get(key) for key in ("steps", "max_steps")]
        return min((limit for limit in limits if type(limit) is int and 0 <= limit < LARGEST_NUMBER), default=None)

    @property
    def steps_done(self) -> int:
        return int(self.rows[-1]["step"]) + 1 if self.rows else 0

    @property
    def finished(self) -> bool:
        """Whether it has its result, of as many steps as it has: one that was resumed may have an older one."""
        if self.result is None:
            return False
        steps = self.result.get("steps", self.steps_done)  # tasks one after the other have none
        return type(steps) is int and steps >= self.steps_done


class FollowedRun:
    """Raises ValueError for a folder that holds no run."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._recipe, self._result = Tail(RECIPE), Tail(RESULT)
        self._stage = 0
        self._open("")

    def _open(self, prefix: str) -> None:
        self._metrics, self._completions = Rows(prefix + METRICS), Rows(prefix + COMPLETIONS)

    def poll(self) -> RunState:
        for tail in (self._recipe, self._result):
            tail.poll(self.folder)
        recipe = _mapping(self._recipe.data)
        in_order = isinstance(recipe.get("continual"), dict)
        if in_order:
            self._to_last_stage()
        for rows in (self._metrics, self._completions):
            rows.poll(self.folder)
        ages = [tail.age for tail in (self._metrics, self._recipe) if tail.age is not None]
        if not ages:
            raise ValueError(f"{self.folder.name}: no run there (neither recipe.yaml nor metrics.jsonl is in it)")
        return RunState(
            place=self.folder.name,
            recipe=recipe,
            rows=tuple(self._metrics.rows),
            completion=self._completions.rows[-1] if self._completions.rows else None,
            result=_mapping(self._result.data) or None,
            age=ages[0],
            task=f"task {self._stage + 1} of {_number_of_tasks(recipe)}" if in_order else "",
            unreadable=self._metrics.unreadable,
        )

    def _to_last_stage(self) -> None:
        """Of a run of tasks one after the other, each of which has a run of its own."""
        if not self._metrics.name.startswith("stages/"):
            self._open(_stage(0))
        while self.folder.fetch(_stage(self._stage + 1) + RECIPE, "", 0, 0) is not None:
            self._stage += 1
            self._open(_stage(self._stage))


def _stage(number: int) -> str:
    return f"stages/task={number:02d}/"


def _number_of_tasks(recipe: Mapping[str, Any]) -> int:
    tasks, order = recipe.get("tasks"), recipe["continual"].get("order")
    return len(order or tasks or ())


def _mapping(text: bytes) -> dict[str, Any]:
    """A recipe or a result as plain data; {} where it is none."""
    try:
        data = read_yaml(text.decode())
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


def number(row: Mapping[str, Any], name: str) -> float | None:
    """A metric of a row; None where it is not there or no number."""
    value = row.get(name)
    countable = isinstance(value, float) or (type(value) is int and abs(value) < LARGEST_NUMBER)
    return float(value) if countable else None  # type: ignore[arg-type]


def completion_text(content: object) -> str:
    """A prompt as one text: of a conversation its last turn."""
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
