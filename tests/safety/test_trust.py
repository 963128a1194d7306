"""Code that comes with a model runs only where the recipe says so; what comes from the hub is named by its commit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from remix import cli, train
from remix.config import RecipeError, dump_recipe, load_recipe, parse_recipe
from remix.training.plan import make_plan
from tests.tiny import ROOT, tiny_recipe

CODE = """
import os
os.makedirs({marker!r}, exist_ok=True)
from transformers import Qwen2Config, Qwen2ForCausalLM
class OwnConfig(Qwen2Config):
    model_type = "own"
class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel"}


@pytest.fixture
def coded(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model as one of a type of its own, with the code for it, which leaves a mark when it runs."""
    folder = tmp_path / "coded"
    shutil.copytree(tiny_model, folder)
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "owned")))
    retyped(folder, "own")
    return folder


def retyped(folder: Path, model_type: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": AUTO_MAP}))


def training(folder: Path, recipe: Any) -> int:
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return train.main([str(path)])


def test_code_is_not_run_unasked(coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training(tmp_path, tiny_recipe(coded, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+ model\.trust_remote_code: true\n", said)
    assert cli.main(["eval", "--model", str(coded), "--benchmarks", "arithmetic", "--limit", "1"]) == 2
    assert "comes with Python code of its own, which is not run" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_code_of_a_critic_is_never_run(
    coded: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "model": {"trust_remote_code": True},
        "advantage": {"type": "gae", "critic": {"type": "separate", "path": str(coded)}},
    }
    assert training(tmp_path, tiny_recipe(tiny_model, tmp_path / "run", changes)) == 2
    assert "comes with Python code of its own" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_a_known_model_does_without_the_code_beside_it(coded: Path, tmp_path: Path) -> None:
    retyped(coded, "qwen2")
    assert training(tmp_path, tiny_recipe(coded, tmp_path / "run", {"steps": 1})) == 0
    assert not (tmp_path / "owned").exists()


def test_code_runs_where_the_recipe_says_so(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which shows that the code above would have left its mark."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    training(tmp_path, tiny_recipe(coded, tmp_path / "run", {"steps": 1, "model": {"trust_remote_code": True}}))
    assert (tmp_path / "owned").exists()


def test_a_kernel_of_the_hub_is_code(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"kernel of the hub, so code: set trust_remote_code to true"):
        tiny_recipe(tiny_model, tmp_path, {"model": {"attn_implementation": "someone/kernel"}})


# --- pins ---------------------------------------------------------------------------------------------------------

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "accelerate" not in path.parts)
COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_ids(block: Any) -> list[tuple[str, str | None]]:
    """(id, revision) of every block of a file with a `path` that no directory or file has."""
    if isinstance(block, list):
        return [found for item in block for found in hub_ids(item)]
    if not isinstance(block, dict):
        return []
    path = block.get("path")
    own = [(path, block.get("revision"))] if isinstance(path, str) and not path.startswith(("./", "../")) else []
    return own + [found for value in block.values() for found in hub_ids(value)]


def test_what_ships_is_pinned() -> None:
    found = {file: hub_ids(yaml.safe_load(file.read_text())) for file in [*RECIPES, *(ROOT / "eval").glob("*.yaml")]}
    assert sum(map(len, found.values())) >= 8 * 2 + 8
    unpinned = {
        str(file): pair for file, pairs in found.items() for pair in pairs if not COMMIT.fullmatch(str(pair[1]))
    }
    assert unpinned == {}
    for file in RECIPES:
        assert not any("not pinned" in note for note in make_plan(load_recipe(file)).notes)


def test_the_plan_warns_of_what_is_not_pinned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes/r1_distill_qwen_1.5b/ppo.yaml")
    critic = "advantage.critic={type: separate, path: owner/critic, revision: main}"
    changes = ["model.revision=v1", "tasks.0.revision=null", critic]
    assert cli.main(["plan", recipe, *changes]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for path, key in (
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "model"),
        ("agentica-org/DeepScaleR-Preview-Dataset", "tasks.0"),
        ("owner/critic", "advantage.critic"),
    ):
        assert f"{path}: not pinned: what the hub serves may change; set {key}.revision to a commit" in shown
    local = {"tasks": [{"type": "hub", "path": str(tmp_path)}, {"type": "hub", "path": recipe}]}
    recipe_of_files = tiny_recipe(ROOT / "recipes/embedded/base", tmp_path / "run", local)
    assert not any("not pinned" in note for note in make_plan(recipe_of_files).notes)


def test_a_critics_revision_needs_its_path() -> None:
    plain = load_recipe(ROOT / "recipes/embedded/remix_ppo.yaml").model_dump(mode="json")
    plain["advantage"]["critic"] = {"type": "separate", "revision": "0" * 40}
    with pytest.raises(RecipeError, match=r"revision belongs to a path: set `path` too"):
        parse_recipe(plain)
