"""The files that a model or an adapter consists of: where they lie, and what they hash to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from remix.durable import sha256

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
ADAPTER_FILES = ("adapter_*.json", "adapter_*.safetensors")
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "chat_template*")
"""What text becomes as token ids, and back."""
ADAPTER_CONFIG = "adapter_config.json"


def find(path: str, revision: str | None, patterns: Iterable[str], what: str) -> Path:
    """The folder of a directory or hub id; from the hub it is fetched, unless it was before. Raises ValueError."""
    if Path(path).is_dir():
        return Path(path).resolve()
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).exists():
        raise ValueError(f"{what} {path}: no such directory; it must be a hub id, or a directory as saved")
    from huggingface_hub import snapshot_download

    try:
        # Beside its checkpoint, a repository may hold copies in other formats and folders.
        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignored))
    except (OSError, ValueError) as error:  # not there, no such revision, gated, no network
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{what} {path}: no such directory, and not to be had from the hub ({cause}); "
            "check the name and the network, or give a directory"
        ) from error


def commit(folder: Path) -> str | None:
    """The hub commit that a folder of its cache holds."""
    return folder.name if folder.parent.name == "snapshots" else None


def fingerprint(folder: Path, patterns: Iterable[str]) -> dict[str, Any]:
    """{"sha256", "files": {name: sha256}}; the first is what `sha256sum <files> | sha256sum` says of the folder."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    names = sorted(file.relative_to(folder).as_posix() for file in found)
    files = {}
    for name in names:
        files[name] = sha256(folder / name)
    listing = "".join(f"{digest}  {name}\n" for name, digest in files.items())
    return {"sha256": hashlib.sha256(listing.encode()).hexdigest(), "files": files}
