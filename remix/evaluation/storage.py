"""What an evaluation leaves on disk, written so that a kill at any moment loses at most the chunk in hand.

run.json                                what is evaluated, and how: the run's identity, by which --resume knows it
generations/<benchmark>/00000.parquet   responses and verdicts, chunk by chunk
problems.jsonl                          one line per problem: verdicts, answers, scores
summary.json  summary.md                the scores, and all that is needed to have them again
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from remix.durable import locked, write_json, written_whole
from remix.evaluation.exam import Response

RUN, GENERATIONS, LOCK = "run.json", "generations", ".lock"
LISTED = 12
"""Differences that an error message names."""
PLACES = {"model.path", "model.commit", "adapter.path"}
"""Where the bytes lie, which their hashes identify."""

_SCHEMA = pa.schema(
    [
        ("problem", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("text", pa.string()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("verdict", pa.string()),
        ("extracted", pa.string()),
    ]
)


class Store:
    """The output folder of one evaluation, open in one process at a time. Opening raises ValueError."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        """`identity`: plain data; a run with another one is another run, and is left alone."""
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        check_free(folder, resume=resume)
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder / LOCK)
        if lock is None:
            raise ValueError(f"--out {folder}: another process is writing there; wait for it, or name another")
        self._lock = lock
        try:
            self._check_same()
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """From here on the folder is this run's. Until then nothing is written, so that what fails leaves nothing."""
        if not (self.folder / RUN).exists():
            write_json(self.folder / RUN, self._identity)

    def _check_same(self) -> None:
        if not (self.folder / RUN).exists():
            return
        before = json.loads((self.folder / RUN).read_text(encoding="utf-8"))
        differences = dict(_differences(before, self._identity))
        if differences.keys() <= PLACES:
            return
        listed = "; ".join([*differences.values()][:LISTED])
        more = f"; and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
        raise ValueError(
            f"--out {self.folder} holds another evaluation: {listed}{more}. "
            "Name another folder, or repeat the command that it was begun with"
        )

    def add(self, benchmark: str, responses: Sequence[Response]) -> None:
        """Keeps a chunk. Its file appears whole or not at all."""
        chunks = self._chunks(benchmark)
        number = int(chunks[-1].stem) + 1 if chunks else 0
        path = self.folder / GENERATIONS / benchmark / f"{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{name: _storable(value) for name, value in asdict(response).items()} for response in responses]
        with written_whole(path) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file, compression="zstd")

    def responses(self, benchmark: str) -> dict[tuple[str, int], Response]:
        """All that is kept, by problem and sample."""
        rows = (row for path in self._chunks(benchmark) for row in pq.read_table(path, schema=_SCHEMA).to_pylist())
        return {(row["problem"], row["sample"]): Response(**row) for row in rows}

    def close(self) -> None:
        if not (self.folder / RUN).exists():
            (self.folder / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # it was there before, with something in it
                self.folder.rmdir()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chunks(self, benchmark: str) -> list[Path]:
        return sorted((self.folder / GENERATIONS / benchmark).glob("*.parquet"))


def check_free(folder: Path, *, resume: bool) -> None:
    """Raises ValueError where the folder cannot take a new run, nor, under `resume`, go on with one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; name a folder")
    if not folder.is_dir() or not any(path.name != LOCK for path in folder.iterdir()):
        return
    if not (folder / RUN).exists():
        raise ValueError(f"--out {folder}: not empty, and what it holds is no evaluation; name another folder")
    if not resume:
        raise ValueError(f"--out {folder} already holds an evaluation: add --resume to go on with it, or name another")


def _storable(value: Any) -> Any:
    """Halves of characters, which a model's text may hold, have no place in UTF-8."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """By dotted name, what was and what is."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, f"{name} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
