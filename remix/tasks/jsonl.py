"""Problems from a local JSON-lines file, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
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
    if not os.path.isfile(path):  # unlike Path.is_file, False for what is too long for a path
        raise ValueError(f"{path}: no such file; relative paths start at the working directory, {Path.cwd()}")
    refuse_pickled(path, "write the problems as JSON lines")
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error}); convert the file") from error
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); each line has to be one JSON object") from error
        except RecursionError:
            raise ValueError(f"{where}: JSON nested too deeply; each line has to be one flat JSON object") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a {type(row).__name__}; each line has to be one JSON object")
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line and its place. As bytes, so that what cannot be decoded has a place, too."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: cannot be read ({error}); copy the file anew") from error
