"""Grading a file of responses: one line out per line in, in order, whatever the lines hold."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from remix.rewards.equivalence import Grade
from remix.rewards.pool import GraderPool

BATCH_LINES = 512
BATCH_BYTES = 8 * 1024**2
"""A batch is graded at a time and ends with whichever of the two comes first, so memory does not grow with the file."""


@dataclass(frozen=True, slots=True)
class _Line:
    fields: Mapping[str, Any]
    """What is written back."""
    golds: tuple[str, ...] = ()
    prediction: str = ""
    problem: str | None = None
    """Why it cannot be graded."""


def grade_file(
    source: Path, target: Path, workers: int, timeout: float, report: Callable[[int], None] = lambda _: None
) -> Counter[str]:
    """Grade {"gold": str | [str], "prediction": str, ...} lines; how many there are of each verdict.

    The target appears when it is whole: until then it is a hidden file beside it. `report` hears of every batch.
    """
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already; name another file, or remove it")
    if not target.parent.is_dir():
        raise ValueError(f"there is no directory {target.parent} to write {target.name} to")
    counts: Counter[str] = Counter()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with source.open("rb") as lines:
        try:
            with partial.open("xb") as out, GraderPool(workers=workers, timeout=timeout) as pool:
                for batch in _batches(lines):
                    grades = _grades([_read(line) for line in batch], pool)
                    for fields, verdict in grades:
                        counts[verdict] += 1
                        out.write(_written(fields))
                    report(len(batch))
                out.flush()
                os.fsync(out.fileno())
            _publish(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return counts


def count_lines(source: Path) -> int | None:
    """For a progress bar; None for what can be read only once, such as a pipe."""
    if not source.is_file():
        return None
    lines, last = 0, b"\n"
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            lines += block.count(b"\n")
            last = block
    return lines + (not last.endswith(b"\n"))


def _batches(lines: BinaryIO) -> Iterator[list[bytes]]:
    while True:
        batch: list[bytes] = []
        size = 0
        for line in islice(lines, BATCH_LINES):
            batch.append(line)
            size += len(line)
            if size >= BATCH_BYTES:
                break
        if not batch:
            return
        yield batch


def _read(line: bytes) -> _Line:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raw = line.decode(errors="backslashreplace").rstrip("\r\n")
        return _Line({"raw": raw}, problem=f"not UTF-8: {error.reason} at byte {error.start}")
    raw = text.rstrip("\r\n")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Line({"raw": raw}, problem=f"not JSON: {error}" if raw.strip() else "a blank line")
    if not isinstance(fields, dict):
        return _Line({"raw": raw}, problem="not a JSON object")
    for name in ("gold", "prediction"):
        if name not in fields:
            return _Line(fields, problem=f"no field '{name}'")
    gold, prediction = fields["gold"], fields["prediction"]
    golds = [gold] if isinstance(gold, str) else gold
    if not isinstance(golds, list) or not golds or not all(isinstance(item, str) for item in golds):
        return _Line(fields, problem="'gold' is neither a string nor a list of strings")
    if not isinstance(prediction, str):
        return _Line(fields, problem="'prediction' is not a string")
    return _Line(fields, tuple(golds), prediction)


def _grades(lines: Sequence[_Line], pool: GraderPool) -> Iterator[tuple[dict[str, Any], str]]:
    sound = [line for line in lines if line.problem is None]
    grades = iter(pool.grade([line.golds for line in sound], [line.prediction for line in sound]))
    for line in lines:
        found = next(grades) if line.problem is None else Grade("error")
        fields = {
            **line.fields,
            "correct": found.verdict == "correct",
            "verdict": found.verdict,
            "extracted": found.extracted,
        }
        if line.problem is not None:
            fields["error"] = line.problem
        yield fields, found.verdict


def _written(fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a character, which JSON can escape and UTF-8 cannot hold
        return json.dumps(fields).encode() + b"\n"


def _publish(partial: Path, target: Path) -> None:
    """Rename, unless somebody has made the target in the meantime."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise ValueError(
            f"{target} has appeared while this ran and is left alone; run again with another name"
        ) from None
    except OSError:  # a file system without hard links
        os.replace(partial, target)
