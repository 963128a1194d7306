"""What data sets of images and a JSON file have in common: the file is read, and its images are found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remix.formats import refuse_pickled
from remix.tasks.rows import cell, image_in, text


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError where there is none, or no JSON in it."""
    if not os.path.isfile(path):  # unlike Path.is_file, False for what is too long for a path
        raise ValueError(f"{path}: no such file; relative paths start at the working directory, {Path.cwd()}")
    refuse_pickled(path, "write the annotations as JSON")
    try:
        return json.loads(path.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy the file anew") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); convert the file") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); it has to hold the annotations as one JSON value") from error
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply for annotations") from None


def rows_of(value: Any, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """A list of objects, each with its place for messages."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: a {type(value).__name__}; it has to be a list of annotations")
    for number, row in enumerate(value):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}[{number}]: a {type(row).__name__}; each annotation has to be an object")
    return [(f"{where}[{number}]", row) for number, row in enumerate(value)]


def member(row: Mapping[str, Any], key: str, kind: type[Any], where: str) -> Any:
    """The value of a key, of that kind."""
    value = cell(row, key, key, where)
    if not isinstance(value, kind):
        raise ValueError(f"{where}: '{key}' is a {type(value).__name__}; it has to be a {kind.__name__}")
    return value


def said(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text or the number of a key."""
    return text(row, key, key, where)


def images_in(folder: Path, names: Sequence[Any], where: str) -> tuple[str, ...]:
    return tuple(image_in(folder, name, where) for name in names)
