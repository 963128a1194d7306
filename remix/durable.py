"""Files and folders that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MANIFEST = "manifest.json"
"""In a folder that was written with one: the size and SHA-256 of every other file."""


class DamagedError(ValueError):
    """A file or folder that is not what was written; the message says what is wrong with it."""


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears under its name when all of it is on the disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk its space is needed
        raise
    sync(path.parent)


@contextmanager
def folder_written_whole(folder: Path, *, manifest: bool = False) -> Iterator[Path]:
    """A folder to fill that appears under its name, in place of an older one, when all of it is on the disk."""
    temporary, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("tmp", "old"))
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if manifest:
            (temporary / MANIFEST).write_text(json.dumps(_listing(temporary), indent=2) + "\n", encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if folder.exists():
            folder.replace(old)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)


def check_manifest(folder: Path) -> None:
    """Raises DamagedError where a file is missing, cut short or changed since the folder was written."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = [(folder / name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()]
    except FileNotFoundError:
        raise DamagedError(f"{MANIFEST} is missing: it was not written to its end") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"{MANIFEST} is not readable ({error})") from error
    for path, size, digest in entries:
        check_file(path, digest, size)


def check_file(path: Path, digest: str, size: int | None = None) -> None:
    """Raises DamagedError where the file is not the one that had this SHA-256, and this size in bytes."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise DamagedError(f"{path.name} has {found:,} bytes, not the {size:,} that were written")
        if sha256(path) != digest:
            raise DamagedError(f"{path.name} has changed since it was written (its SHA-256 differs)")
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except OSError as error:
        raise DamagedError(f"{path.name} is not readable ({error})") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """The file appears whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())


def link(path: Path, target: str) -> None:
    """A symbolic link that names its new target from one moment to the next."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)
    sync(path.parent)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """What was written of a file, or the names in a folder, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(path: Path) -> IO[str] | None:
    """The lock file, open and held by this process alone until it is closed; None where another process holds it.

    The kernel lets go of it when the process ends, however it does.
    """
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
