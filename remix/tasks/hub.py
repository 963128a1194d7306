"""Problems from anything that `datasets.load_dataset` reads: a hub id, a local folder, or a local file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from remix.config import HubTask
from remix.formats import NOT_READ, first_pickled, refuse_pickled
from remix.tasks.rows import Row, Split, cut, to_prompts
from remix.types import Prompt

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
"""By suffix: what reads a single file."""
FORMATS = frozenset(BUILDERS.values())
"""What a data set may consist of: tables of plain values, which cannot hold code."""
REMEDY = "write the problems as Parquet or JSON lines"


def load_hub(config: HubTask, split: Split, task: str) -> list[Prompt]:
    """The problems of one split: `eval_split` is the test split, or else a share of `split`; `limit` is for `split`."""
    if split == "test" and config.eval_split is not None:
        return to_prompts(_rows(config, config.eval_split, None), config, task)
    prompts = to_prompts(_rows(config, config.split, config.limit), config, task)
    return prompts if config.eval_split is not None else cut(prompts, config.holdout, split)


def _rows(config: HubTask, split: str, limit: int | None) -> Iterator[Row]:
    rows = load_rows(config.path, name=config.name, revision=config.revision, split=split)
    optional = (config.id, config.solution)
    rows = narrowed(rows, [config.problem, config.answer, *(column for column in optional if column is not None)])
    for number, row in enumerate(rows if limit is None else rows.select(range(min(limit, len(rows))))):
        yield f"{config.path} ({split}), row {number}", row


def load_rows(path: str, *, name: str | None, revision: str | None, split: str) -> Any:
    """One split as `datasets` gives it. Raises ValueError with the cause in one line."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    wanted, files = path, None
    if Path(path).is_file():
        refuse_pickled(path, REMEDY)
        if Path(path).suffix not in BUILDERS:
            raise ValueError(f"{path}: files are read by suffix, one of {', '.join(BUILDERS)}; rename or convert it")
        path, files = BUILDERS[Path(path).suffix], path
    elif path in FORMATS | {"pandas", "webdataset"}:
        raise ValueError(f"the data set '{path}': that is a format; name a data set of the hub, a folder or a file")
    try:
        builder = load_dataset_builder(path, name=name, revision=revision, data_files=files)
        # `datasets` has readers for dozens of formats, some of which unpickle.
        chosen = type(builder).__module__.rpartition(".")[2]
        if chosen not in FORMATS | {"cache"}:  # what it made of such files before, where there is no network now
            raise ValueError(f"its files are of the kind '{chosen}', of {', '.join(sorted(FORMATS))} is read; {REMEDY}")
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except (
        DatasetNotFoundError,
        DatasetGenerationError,
        FileNotFoundError,
        ConnectionError,
        RuntimeError,
        ValueError,
    ) as error:
        cause = " ".join(str(error).split())
        if Path(path).is_dir() and (pickled := first_pickled(Path(path), ["**/*"])) is not None:
            cause = f"{cause}; {pickled}: {NOT_READ}, {REMEDY}"
        raise ValueError(
            f"the data set '{wanted}' (name {name}, split {split}) cannot be loaded: {cause}; "
            "check `path`, `name`, `split` and the network, or give a local folder or file"
        ) from error


def narrowed(rows: Any, columns: Iterable[str]) -> Any:
    """These columns alone: others may be large (images, solutions). Where one is missing, all, to say so."""
    wanted = list(dict.fromkeys(columns))
    return rows.select_columns(wanted) if set(wanted) <= set(rows.column_names) else rows


def loaded_revision(rows: Any) -> str | None:
    """The commit that a data set of the hub was loaded at, where `datasets` has kept it."""
    # Every file that was fetched is recorded as hf://datasets/owner/name@commit/path.
    for file in rows.info.download_checksums or {}:
        found = re.search(r"@([0-9a-f]{40})/", str(file))
        if found is not None:
            return found[1]
    return None
