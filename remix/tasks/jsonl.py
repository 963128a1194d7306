"""Problems from a local JSON-lines file, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from remix.config import JsonlTask
from remix.formats import refuse_pickled
from remix.tasks.rows import Row, Split, cut, to_prompts
from remix.types import Prompt


def load_jsonl(config: JsonlTask, split: Split, task: str) -> list[Prompt]:
    """The problems of one split: `eval_path` is the test split, or else a share of `path`; `limit` is for `path`."""
    if split == "test" and config.eval_path is not None:
        return to_prompts(read_rows(Path(config.eval_path)), config, task)
    prompts = to_prompts(islice(read_rows(Path(config.path)), config.limit), config, task)
    return prompts if config.eval_path is not None else cut(prompts, config.holdout, split)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, each with its place. Raises ValueError on what is not JSON lines."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; relative paths start at the working directory, {Path.cwd()}")
    refuse_pickled(path, "write the problems as JSON lines")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            yield from _parsed(lines, path)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not JSON lines ({error}); write one JSON object a line, as text in UTF-8") from error


def _parsed(lines: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}); each line has to be one JSON object") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a {type(row).__name__}; each line has to be one JSON object")
        yield f"{path}:{number}", row
