"""Where models lie and what they hash to."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from remix.config import ModelConfig
from remix.models.files import MODEL_FILES, commit, find, fingerprint
from remix.models.loading import context_length, eos_token_ids, load_tokenizer
from tests.tiny import EMBEDDED


def test_the_fingerprint_is_that_of_the_shell(tmp_path: Path) -> None:
    for name, text in {"b.safetensors": "two", "a.safetensors": "one", "notes.txt": "not hashed"}.items():
        (tmp_path / name).write_text(text)
    found = fingerprint(tmp_path, ["*.safetensors"])
    listing = subprocess.check_output("sha256sum *.safetensors", shell=True, cwd=tmp_path, text=True)
    assert [*found["files"]] == ["a.safetensors", "b.safetensors"]
    assert listing == "".join(f"{digest}  {name}\n" for name, digest in found["files"].items())
    assert subprocess.check_output(["sha256sum"], input=listing, text=True).split()[0] == found["sha256"]


def test_where_a_model_lies(tmp_path: Path) -> None:
    assert find(str(tmp_path), None, MODEL_FILES, "--model") == tmp_path.resolve()
    for nowhere in ("./nowhere", "/nowhere", "a/b/c", "nowhere"):
        with pytest.raises(ValueError, match=f"--model {nowhere}: no such directory"):
            find(nowhere, None, MODEL_FILES, "--model")
    with pytest.raises(
        ValueError, match="--model owner/nowhere: no such directory, and not fetched from the hub before"
    ):
        find("owner/nowhere", None, MODEL_FILES, "--model")
    assert commit(Path("/hub/models--owner--name/snapshots/0123abcd")) == "0123abcd"
    assert commit(tmp_path) is None


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 256),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}, 400),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}, 256),
    ],
)
def test_the_context_of_a_model(rope: dict[str, object], expected: int, tmp_path: Path) -> None:
    config = json.loads((EMBEDDED / "base" / "config.json").read_text()) | {"rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(ModelConfig(path=str(tmp_path))) == expected


def test_what_ends_a_response_comes_from_the_generation_config_then_the_model(tmp_path: Path) -> None:
    for file in (EMBEDDED / "base").glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    config = ModelConfig(path=str(tmp_path))
    tokenizer = load_tokenizer(config)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert eos_token_ids(config, tokenizer) == (1, 7)
    (tmp_path / "generation_config.json").unlink()
    assert eos_token_ids(config, tokenizer) == (1,)
