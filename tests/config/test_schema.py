"""The JSON Schema and the reference of the recipe's keys: they are those of the code, and say what it takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from remix import cli
from remix.config import dump_recipe, load_recipe
from remix.config.schema import recipe_schema
from tests.config.test_recipes import ALL, MINIMAL, RECIPES
from tests.tiny import ROOT

SCHEMA = recipe_schema()
BLOCKS = {"Recipe": SCHEMA, **SCHEMA["$defs"]}
DOCS = ROOT / "docs"


def problems(data: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(data)]


def test_the_files_are_those_of_the_code(tmp_path: Path) -> None:
    assert cli.main(["schema", "--out", str(tmp_path)]) == 0
    for made in tmp_path.iterdir():
        kept = DOCS / made.name
        assert made.read_text() == kept.read_text(), "out of date: run `remix schema --out docs`"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.md", "recipe.schema.json"]


def test_both_can_be_had_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, name in (([], "recipe.schema.json"), (["--markdown"], "recipe.md")):
        assert cli.main(["schema", *options]) == 0
        assert capsys.readouterr().out == (DOCS / name).read_text()
    assert cli.main(["schema", "--out", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_recipe_is_valid_and_names_the_schema(path: Path) -> None:
    assert problems(yaml.safe_load(path.read_text())) == []
    assert problems(yaml.safe_load(dump_recipe(load_recipe(path)))) == []
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", path.read_text().splitlines()[0])
    assert named is not None
    assert (path.parent / named[1]).resolve() == DOCS / "recipe.schema.json"


@pytest.mark.parametrize(
    "change",
    [
        {"optimiser": {}},
        {"optimizer": {"learning_rate": 1}},
        {"adapter": {"rank": 4}},
        {"adapter": {"type": "lorra"}},
        {"adapter": {"type": "ia3", "rank": 4}},
        {"batch": {"prompts": 0}},
        {"batch": {"prompts": "many"}},
        {"tasks": []},
        {"phases": [{"utd_ratio": 2}]},
        {"phases": [{"type": "on_policy", "window": 2}]},
        {"kl": {"estimator": "k4"}},
        {"steps": None},
    ],
    ids=str,
)
def test_what_is_wrong_is_seen(change: dict[str, Any]) -> None:
    data = yaml.safe_load(MINIMAL)
    assert problems(data) == []
    assert problems(data | change)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_and_key_says_what_it_means(name: str) -> None:
    block = BLOCKS[name]
    assert block.get("description", "")
    silent = [key for key, value in block["properties"].items() if "const" not in value and "description" not in value]
    assert silent == []


def test_the_reference_has_every_key_and_no_dead_link() -> None:
    page = (DOCS / "recipe.md").read_text()
    tables = {
        name: {key for key, value in block["properties"].items() if "const" not in value}
        for name, block in BLOCKS.items()
    }
    assert sum(map(len, tables.values())) == len(re.findall(r"^\| `", page, re.MULTILINE))
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert len(titles) == len(set(titles)) == len(BLOCKS) - 1
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) == anchors
    assert "| `off_policy_fraction` | number ≥ 0, < 1 | `0.4` | p: the share of the batch" in page
