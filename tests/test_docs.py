"""The pages of docs/ say what is there: messages, keys, metrics, functions and commands are those of the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from remix import cli
from remix.config import load_recipe
from remix.config.schema import recipe_schema
from tests.tiny import ROOT

DOCS = ROOT / "docs"
SCHEMA = recipe_schema()
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
EXPLAINING = ["concepts.md", "troubleshooting.md"]


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """What stands in backticks within lines."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


# --- messages and metrics -----------------------------------------------------------------------------------------


def strings() -> Iterator[str]:
    """Every text in the source, with … where a value is put in."""
    for path in (ROOT / "remix").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


STRINGS = set(strings())
METRICS = [
    re.compile("".join(".+" if part == "…" else re.escape(part) for part in re.split("(…)", text)))
    for text in STRINGS
    if re.fullmatch(r"[a-z_]+(/(…|[\w@]+))*", text)
]


def is_said(message: str) -> bool:
    fragments = [re.escape(fragment.strip()) for fragment in message.split("…")]
    assert len("".join(fragments)) > 10
    pattern = re.compile(".*".join(fragments), re.DOTALL)
    return any(pattern.search(text) for text in STRINGS)


def is_metric(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in METRICS)


def seen() -> list[str]:
    """The first cells of the tables of symptoms: messages in backticks with a space in them, metrics without."""
    cells = re.findall(r"^\| ([^|]+) \|", page("troubleshooting.md"), re.MULTILINE)
    return [span for cell in cells for span in spans(cell)]


@pytest.mark.parametrize("message", [span for span in seen() if " " in span])
def test_every_quoted_message_is_said_by_the_code(message: str) -> None:
    assert is_said(message)


def test_the_search_can_fail() -> None:
    assert not is_said("run_dir … already holds a cat")
    assert is_metric("ess/lag=1")
    assert not is_metric("essence/lag=1")
    assert not is_metric("kl/refernce")
    assert key_exists("phases.0.until")
    assert not key_exists("phases.0.utd")


def test_every_metric_is_logged() -> None:
    named = [span for span in seen() if " " not in span]
    table = page("concepts.md").split("## How to read a run")[1].split("## When it pays")[0]
    named += [span for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for span in spans(cell)]
    assert len(named) > 40
    assert [name for name in named if not is_metric(name)] == []


# --- keys and functions -------------------------------------------------------------------------------------------


def within(value: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all that it may be."""
    if "$ref" in value:
        value = SCHEMA["$defs"][value["$ref"].rpartition("/")[2]]
    yield value
    for choice in (*value.get("anyOf", ()), *value.get("oneOf", ())):
        yield from within(choice)


def key_exists(key: str) -> bool:
    places: list[Mapping[str, Any]] = [SCHEMA]
    for part in key.split("."):
        known = [choice for place in places for choice in within(place)]
        places = [inner["properties"][part] for inner in known if part in inner.get("properties", ())]
        places += [inner["items"] for inner in known if part.isdigit() and "items" in inner]
    return bool(places)


_KEY = re.compile(r"[a-z_]+(?:\.[a-z0-9_]+)+(?<!\.py)")


@pytest.mark.parametrize("name", EXPLAINING)
def test_every_key_exists(name: str) -> None:
    words = [re.split("[:= ]", span)[0] for span in spans(page(name))]
    keys = {word for word in words if _KEY.fullmatch(word) and word.split(".")[0] in SCHEMA["properties"]}
    assert len(keys) > 15
    assert [key for key in sorted(keys) if not key_exists(key)] == []


def test_every_function_is_where_it_is_said_to_be() -> None:
    found = re.findall(r"`(\w+)`[^`|\[]*? in\s+\[`[\w.]+`\]\(([^)]+)\)", page("concepts.md"))
    assert len(found) >= 9
    for function, place in found:
        assert f"def {function}(" in (DOCS / place).read_text(), function


# --- commands -----------------------------------------------------------------------------------------------------


def commands(name: str) -> list[str]:
    whole = page(name).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in whole.splitlines() if _COMMAND.match(line)]


_COMMAND = re.compile(r"(?: {4,}|(?<=^))(?:remix|accelerate|python) \S")
ALL = [(name, command) for name in PAGES for command in commands(name)]


@pytest.mark.parametrize(("name", "command"), ALL, ids=[command for _, command in ALL])
def test_every_command_is_one(name: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    for word in words:
        if word.endswith((".py", ".sh", ".yaml")):
            assert Path(word).exists()
    if words[0] != "remix":
        return
    if words[1] == "plan":
        assert cli.main(words[1:]) == 0
        return
    args, rest = cli._parser().parse_known_args(words[1:])
    assert not [word for word in rest if word.startswith("-")]
    if words[1] == "train":
        recipe, overrides = cli._split([*args.words, *rest])
        assert (recipe is None) == (args.resume not in (None, "auto"))
        if recipe is not None:
            load_recipe(recipe, overrides)


def test_the_recipe_for_a_model_of_ones_own_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n# mine\.yaml\n(.*?)```", page("training.md"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert cli.main(["plan", str(tmp_path / "mine.yaml")]) == 0


def test_the_pages_have_commands() -> None:
    assert {name for name, _ in ALL} >= {*EXPLAINING, "scale.md"}
