"""Nothing of pickle is read, wherever it lies, and no source file has the means to."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from remix import cli, train
from remix.config import dump_recipe
from tests.tiny import EMBEDDED, ROOT, tiny_recipe


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    marker = tmp_path / "owned"
    yield marker
    assert not marker.exists(), "a pickle was opened"


@pytest.fixture
def pickled_model(tiny_model: Path, tmp_path: Path, marker: Path) -> Path:
    """A whole model, but for its weights, which are a pickle."""
    folder = tmp_path / "pickled_model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(Bomb(marker), folder / "pytorch_model.bin")
    return folder


def refusal(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """What a command said that refused: one line."""
    said = capsys.readouterr()
    assert status == 2, said.err
    lines = [line for line in said.err.splitlines() if line]
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    return lines[0]


def training(folder: Path, recipe: Any, *words: str) -> int:
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else dump_recipe(recipe))
    return train.main([str(path), *words])


def test_the_bomb_goes_off_where_pickles_are_opened(tmp_path: Path) -> None:
    """What the other tests rely on."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "a")))
    torch.save(Bomb(tmp_path / "b"), tmp_path / "b.pt")
    torch.load(tmp_path / "b.pt", weights_only=False)
    assert (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()


# --- models -------------------------------------------------------------------------------------------------------


def test_pickled_weights(pickled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, training(tmp_path, tiny_recipe(pickled_model, tmp_path / "run")))
    assert "model.path: " in said
    assert f"{pickled_model}/pytorch_model.bin: a pickle can run code" in said
    assert "save_pretrained(folder) writes safetensors" in said
    assert not (tmp_path / "run").exists()
    said = refusal(capsys, cli.main(["eval", "--model", str(pickled_model), "--benchmarks", "arithmetic"]))
    assert "pytorch_model.bin: a pickle can run code" in said


def test_a_pickled_critic(
    tiny_model: Path, pickled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    critic = {"advantage": {"type": "gae", "critic": {"type": "separate", "path": str(pickled_model)}}}
    said = refusal(capsys, training(tmp_path, tiny_recipe(tiny_model, tmp_path / "run", critic)))
    assert f"advantage.critic.path: {pickled_model}/pytorch_model.bin: a pickle" in said


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../elsewhere.safetensors"])
def test_an_index_leads_to_no_other_files(
    pickled_model: Path, shard: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
    (pickled_model / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refusal(capsys, training(tmp_path, tiny_recipe(pickled_model, tmp_path / "run")))
    assert f"names '{shard}', which is no safetensors file beside it" in said


def test_a_pickle_by_another_name(pickled_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pickled_model / "pytorch_model.bin").rename(pickled_model / "model.safetensors")
    said = refusal(capsys, training(tmp_path, tiny_recipe(pickled_model, tmp_path / "run")))
    assert "no usable weights there" in said


def test_a_pickle_beside_safetensors_is_left_alone(tiny_model: Path, marker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_model, folder)
    torch.save(Bomb(marker), folder / "pytorch_model.bin")
    assert training(tmp_path, tiny_recipe(folder, tmp_path / "run", {"steps": 1})) == 0


def test_a_pickled_adapter(tiny_model: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": str(tiny_model)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"base_model.model.x": Bomb(marker)}, folder / "adapter_model.bin")
    command = ["eval", "--model", str(tiny_model), "--adapter", str(folder), "--benchmarks", "arithmetic"]
    said = refusal(capsys, cli.main([*command, "--out", str(tmp_path / "out")]))
    assert f"{folder}/adapter_model.bin: a pickle can run code" in said
    assert "save_pretrained(folder) writes safetensors" in said


def test_an_adapter_that_brings_a_tokenizer_with_code(
    tiny_model: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT would load what the adapter's own file names, with the trust that the file itself grants."""
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}')
    (folder / "code.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}
    config |= {"prompt_tuning_init_text": "x", "tokenizer_name_or_path": str(folder)}
    config |= {"tokenizer_kwargs": {"trust_remote_code": True}, "base_model_name_or_path": str(tiny_model)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    save_file({"prompt_embeddings": torch.zeros(2, 64)}, folder / "adapter_model.safetensors")
    command = ["eval", "--model", str(tiny_model), "--adapter", str(folder), "--benchmarks", "arithmetic"]
    status = cli.main([*command, "--limit", "1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status == 2
    assert "it names a tokenizer to load" in said
    # Without that it is an adapter like any other, whatever lies beside it.
    named = {"prompt_tuning_init": "RANDOM", "tokenizer_name_or_path": None, "tokenizer_kwargs": None}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **named, "task_type": "CAUSAL_LM"}))
    assert cli.main([*command, "--limit", "1", "--engine", "hf", "--out", str(tmp_path / "out")]) == 0


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x.pt", ": "),
        ("x.pkl", ": "),
        ("x.jsonl", ":1: not UTF-8"),
        ("x.jsonl.gz", ":1: cannot be read (Not a gzipped file"),
    ],
)
def test_pickled_problems(
    name: str, reason: str, tiny_model: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Bomb(marker)))
    changes = {"tasks": [{"type": "jsonl", "path": str(file)}]}
    said = refusal(capsys, training(tmp_path, tiny_recipe(tiny_model, tmp_path / "run", changes)))
    assert f"{file}{reason}" in said
    assert ("a pickle can run code" in said) == (name in ("x.pt", "x.pkl"))


@pytest.mark.parametrize("path", ["{folder}", "{folder}/a.pkl", "pandas"])
def test_a_pickled_data_set(
    path: str,
    tiny_model: Path,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    torch.save(Bomb(marker), folder / "b.pt")
    monkeypatch.chdir(folder)  # where `datasets` would look for the files of a bare format
    changes = {"tasks": [{"type": "hub", "path": path.format(folder=folder)}]}
    said = refusal(capsys, training(tmp_path, tiny_recipe(tiny_model, tmp_path / "run", changes)))
    assert ("that is a format" if path == "pandas" else f"{folder}/a.pkl: a pickle can run code") in said


@pytest.mark.parametrize(("file", "kind"), [("a.tar", "webdataset"), ("a.h5", "hdf5"), ("a.arrow", "arrow")])
def test_a_data_set_of_another_kind(
    file: str, kind: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / file).write_bytes(b"whatever")
    changes = {"tasks": [{"type": "hub", "path": str(folder)}]}
    said = refusal(capsys, training(tmp_path, tiny_recipe(tiny_model, tmp_path / "run", changes)))
    assert f"its files are of the kind '{kind}', of csv, json, parquet is read" in said


def test_a_data_set_with_a_script(
    tiny_model: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    changes = {"tasks": [{"type": "hub", "path": str(folder)}]}
    assert "cannot be loaded" in refusal(capsys, training(tmp_path, tiny_recipe(tiny_model, tmp_path / "run", changes)))


# --- recipes and runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "plan"])
def test_yaml_with_a_tag(command: str, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"run_dir: !!python/object/apply:os.system ['mkdir {marker}']\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    said = refusal(capsys, train.main([str(path)]) if command == "train" else cli.main(["plan", str(path)]))
    assert "not readable as YAML: could not determine a constructor for the tag" in said
    assert not marker.exists()
    yaml.unsafe_load(text)  # the control: another loader obeys
    marker.rmdir()


def test_pickled_checkpoints(
    tiny_model: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    folder = run_dir / "checkpoints" / "step=000001"
    folder.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_recipe(tiny_recipe(tiny_model, run_dir)))
    torch.save(Bomb(marker), folder / "optimizer.pt")
    said = refusal(capsys, train.main(["--resume", str(run_dir)]))
    assert f"{folder}/optimizer.pt: a pickle can run code" in said


# --- the sources --------------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
CALLS = {
    "os.popen",
    "os.system",
    "np.load",
    "numpy.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "tempfile.mktemp",
    "torch.load",
    "torch.save",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
}
BUILTINS = {"compile", "eval", "exec", "__import__"}
ALLOWED: dict[str, set[str]] = {}
"""By file, what stands there for a reason. Nothing does."""


def dangers(source: str) -> Iterator[str]:
    """What a source file has that runs code out of files or text; full names, whatever they were imported as."""
    names: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if alias.name.split(".")[0] in MODULES:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            if str(node.module).split(".")[0] in MODULES:
                yield str(node.module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = ast.unparse(node)
            root, dot, rest = name.partition(".")
            name = f"{names.get(root, root)}{dot}{rest}"
            is_builtin = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and name in BUILTINS
            if name in CALLS or is_builtin:
                yield name
        if isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) != "False":
            yield "shell=True"


def test_no_source_has_the_means() -> None:
    files = [file for folder in ("remix", "scripts", "eval") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)): set(dangers(file.read_text(encoding="utf-8"))) for file in files}
    assert {file: names for file, names in found.items() if names} == ALLOWED


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("import dill as d", "dill"),
        ("def f():\n    from joblib import load", "joblib"),
        ("import torch\nx = torch.load('a')", "torch.load"),
        ("import torch as t\nf = t.load", "torch.load"),
        ("from torch import load as get\nget('a')", "torch.load"),
        ("import numpy as np\nnp.load('a')", "numpy.load"),
        ("import pandas as pd\npd.read_pickle('a')", "pandas.read_pickle"),
        ("import yaml\nyaml.load('a', yaml.SafeLoader)", "yaml.load"),
        ("from yaml import unsafe_load\nunsafe_load('a')", "yaml.unsafe_load"),
        ("eval('1')", "eval"),
        ("list(map(exec, []))", "exec"),
        ("import os\nos.system('ls')", "os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
        ("import re\nmodel.eval(); re.compile('a'); model.load('a')", None),
    ],
)
def test_the_audit_can_fail(source: str, found: str | None) -> None:
    assert list(dangers(source)) == ([] if found is None else [found])


def test_every_yaml_and_json_that_ships_is_plain_data() -> None:
    files = [*(ROOT / "eval").glob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")]
    assert len(files) > 20
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)
    assert {file.suffix for file in (EMBEDDED / "base").iterdir()} == {".json", ".md", ".safetensors"}
