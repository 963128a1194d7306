"""Problems from anything that `datasets.load_dataset` reads: a hub id, a local folder, or a local file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remix.config import HubTask
from remix.tasks.rows import Row, Split, cut, to_prompts
from remix.types import Prompt

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
"""By suffix: what reads a single file."""


def load_hub(config: HubTask, split: Split, task: str) -> list[Prompt]:
    """The problems of one split: `eval_split` is the test split, or else a share of `split`; `limit` is for `split`."""
    if split == "test" and config.eval_split is not None:
        return to_prompts(_rows(config, config.eval_split, None), config, task)
    prompts = to_prompts(_rows(config, config.split, config.limit), config, task)
    return prompts if config.eval_split is not None else cut(prompts, config.holdout, split)


def _rows(config: HubTask, split: str, limit: int | None) -> Iterator[Row]:
    rows = _load(config, split)
    wanted = [column for column in (config.id, config.problem, config.answer) if column in rows.column_names]
    # Columns that nobody asked for may be large (images, solutions); where one is missing, all are needed to say so.
    if len(wanted) == 2 + (config.id is not None):
        rows = rows.select_columns(list(dict.fromkeys(wanted)))
    for number, row in enumerate(rows if limit is None else rows.select(range(min(limit, len(rows))))):
        yield f"{config.path} ({split}), row {number}", row


def _load(config: HubTask, split: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    path, files = config.path, None
    if Path(path).is_file():
        if Path(path).suffix not in BUILDERS:
            raise ValueError(f"{path}: files are read by suffix, one of {', '.join(BUILDERS)}; rename or convert it")
        path, files = BUILDERS[Path(path).suffix], path
    try:
        return load_dataset(path, name=config.name, revision=config.revision, split=split, data_files=files)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(
            f"the data set '{config.path}' (name {config.name}, split {split}) cannot be loaded: {cause}; "
            "check `path`, `name`, `split` and the network, or give a local folder or file"
        ) from error
