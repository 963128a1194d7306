"""The files that a model or an adapter consists of: where they lie, and what they hash to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from remix.durable import sha256
from remix.formats import NOT_READ, first_pickled

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""All that comes with weights: configuration, tokenizer, chat template."""
MODEL_FILES = (*SMALL_FILES, "*.safetensors")
ADAPTER_FILES = ("adapter_*.json", "adapter_*.safetensors")
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "chat_template*")
"""What text becomes as token ids, and back."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
CONVERT = (
    "convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder) writes "
    "safetensors"
)


def find(path: str, revision: str | None, patterns: Iterable[str], what: str) -> Path:
    """The folder of a directory or hub id; from the hub it is fetched, unless it was before. Raises ValueError."""
    if Path(path).is_dir():
        return Path(path).resolve()
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists():
        raise ValueError(f"{what} {path}: no such directory; it must be a hub id, or a directory as saved")
    from huggingface_hub import constants, snapshot_download

    try:
        # Beside its checkpoint, a repository may hold copies in other formats and folders.
        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignored))
    except (OSError, ValueError) as error:  # not there, no such revision, gated, no network
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{what} {path}: no such directory, and not fetched from the hub before, which HF_HUB_OFFLINE keeps "
                "it from: unset that, or give a directory"
            ) from error
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{what} {path}: no such directory, and not to be had from the hub ({cause}); "
            "check the name and the network, or give a directory"
        ) from error


def check_weights(folder: Path) -> None:
    """Raises ValueError where a folder's weights are not all there, in safetensors."""
    if (folder / INDEX).is_file():
        try:
            shards = sorted(
                {str(shard) for shard in json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()}
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / INDEX}: not an index of weights; save or download the model again") from None
        # Whatever the index names would be opened, by its suffix.
        odd = [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]
        if odd:
            raise ValueError(f"{folder / INDEX}: names {odd[0]!r}, which is no safetensors file beside it; {CONVERT}")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}")
    elif not any(folder.glob("*.safetensors")):
        pickled = first_pickled(folder)
        if pickled is not None:
            raise ValueError(f"{pickled}: {NOT_READ}; {CONVERT}")
        raise ValueError(f"{folder}: no weights (*.safetensors): save or download the model there")


def check_adapter(folder: Path) -> None:
    """Raises ValueError where a folder holds no adapter's weights in safetensors."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        return
    pickled = first_pickled(folder, ["adapter_*"])
    if pickled is not None:
        raise ValueError(
            f"{pickled}: {NOT_READ}; convert it where you trust it: "
            "PeftModel.from_pretrained(base, folder).save_pretrained(folder) writes safetensors"
        )
    raise ValueError(f"{folder}: no {ADAPTER_WEIGHTS} there, as PEFT saves it")


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
