"""Files that run code when they are opened, told by their names: none of them is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PICKLED = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
"""Suffixes of pickles, and of what may hold one."""


def is_pickled(path: str | Path) -> bool:
    return Path(path).suffix.lower() in PICKLED


def first_pickled(folder: Path, patterns: Iterable[str] = ("*",)) -> Path | None:
    """The first such file that a folder holds under these patterns, in order of name."""
    return min((file for pattern in patterns for file in folder.glob(pattern) if is_pickled(file)), default=None)


def refuse_pickled(path: str | Path, remedy: str) -> None:
    """Raises ValueError for a file that is a pickle by its name."""
    if is_pickled(path):
        raise ValueError(f"{path}: {NOT_READ}; {remedy}")


NOT_READ = "a pickle can run code when it is opened, so none is read"
