"""Who may know whom: no floor imports a higher one, a heavy library enters through few doors. And nothing is long."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "remix"

FLOORS = {
    "remix.types": 0,
    "remix.errors": 0,
    "remix.durable": 1,
    "remix.formats": 0,
    "remix.imports": 0,
    "remix.secrets": 0,
    "remix.terminal": 0,
    "remix.algorithms": 1,
    "remix.config": 2,
    "remix.replay": 2,
    "remix.tasks": 2,
    "remix.rewards": 2,
    "remix.merging.methods": 1,
    "remix.merging.lora": 1,
    "remix.models": 3,
    "remix.merging": 3,
    "remix.merging.continual": 4,
    "remix.merging.command": 4,
    "remix.merging.evaluating": 4,
    "remix.rollout": 3,
    "remix.checkpoint": 3,
    "remix.tracking": 3,
    "remix.training": 4,
    "remix.reporting": 4,
    "remix.evaluation": 4,
    "remix.train": 5,
    "remix.cli": 5,
    "remix": 6,
}
"""Of a module and all beneath it; the longest name that fits counts. The package itself is the public face."""

DOORS = {
    "PIL": {"remix.tasks.images", "remix.tasks.shapes"},
    "vllm": {"remix.rollout.serve", "remix.rollout.vllm", "remix.rollout.vllm_weights"},
    "httpx": {"remix.rollout.replica", "remix.rollout.server"},
    "accelerate": {"remix.training.distributed"},
    "deepspeed": set(),
    "datasets": {"remix.tasks.hub"},
    "peft": {"remix.models.adapters"},
    "transformers": {
        "remix.models.loading",
        "remix.models.naming",
        "remix.models.packing",
        "remix.rollout.hf",
        "remix.rollout.hf_cache",
    },
    "math_verify": {"remix.rewards.equivalence"},
    "vl_convert": {"remix.reporting.vega"},
    "pyarrow": {"remix.replay", "remix.evaluation.storage"},
    "safetensors": {
        "remix.checkpoint",
        "remix.models.adapters",
        "remix.models.loading",
        "remix.models.shards",
        "remix.rollout.frames",
        "remix.rollout.vllm_weights",
    },
}
"""The modules that may import a heavy library."""

PURE = {
    "remix.types": {"torch"},
    "remix.algorithms": {"torch"},
    "remix.merging.methods": {"torch"},
    "remix.merging.lora": {"torch"},
}
"""Floors 0 and 1 know no third-party package but these."""


def name_of(file: Path) -> str:
    parts = ("remix", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str) -> Iterator[str]:
    """Every module that is imported, at the top, in a function or for types only; full names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                if alias.name == "__version__":
                    continue  # a constant
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def floor(module: str) -> int:
    while module not in FLOORS:
        module = module.rpartition(".")[0]
        assert module, "not of this package"
    return FLOORS[module]


def upward(module: str, source: str) -> list[str]:
    own = [name for name in imports(source) if name == "remix" or name.startswith("remix.")]
    return [name for name in own if floor(name) > floor(module)]


@pytest.mark.parametrize("module", MODULES)
def test_no_floor_imports_a_higher_one(module: str) -> None:
    assert upward(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_every_room_has_its_floor() -> None:
    rooms = {".".join(module.split(".")[:2]) for module in MODULES}
    assert rooms == {name for name in FLOORS if name.count(".") < 2}, "give a new room its row in FLOORS"


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_enters_through_its_door(library: str) -> None:
    users = {
        module
        for module, file in MODULES.items()
        if any(name.split(".")[0] == library for name in imports(file.read_text(encoding="utf-8")))
    }
    assert users == DOORS[library]


def test_the_equations_know_torch_alone() -> None:
    for module, file in MODULES.items():
        allowed = next((known for room, known in PURE.items() if f"{module}.".startswith(f"{room}.")), None)
        if allowed is not None:
            roots = {name.split(".")[0] for name in imports(file.read_text(encoding="utf-8"))}
            assert roots - sys.stdlib_module_names - {"remix"} <= allowed, module


def test_the_reading_sees_every_kind_of_import() -> None:
    source = """
from typing import TYPE_CHECKING
import remix.types
if TYPE_CHECKING:
    from remix.config import Recipe
def late():
    from remix import replay, checkpoint
    from remix.training.loop import Trainer
"""
    found = ["remix.training.loop", "remix.checkpoint"]
    assert sorted(upward("remix.tasks.hub", source)) == sorted(found)
    assert sorted(upward("remix.algorithms.losses", source)) == sorted([*found, "remix.config", "remix.replay"])
    assert upward("remix.cli", source) == []
    assert upward("remix.models.policy", "import remix") == ["remix"]


def loaded_by(*modules: str) -> set[str]:
    """The packages in a new interpreter after these imports."""
    code = f"import json, sys; import {', '.join(modules)}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    return {name.split(".")[0] for name in json.loads(output)}


def test_the_package_and_its_commands_are_light() -> None:
    heavy = {"torch", "numpy", *DOORS}
    assert loaded_by("remix", "remix.cli", "remix.train") & heavy == set()
    assert loaded_by("remix.config") & heavy == set(), "a recipe is checked without torch"
    assert loaded_by("remix.tracking.watch_view", "remix.tracking.remote") & heavy == set(), "a run is watched so too"


def test_every_public_name_is_there() -> None:
    import remix

    assert {name: hasattr(remix, name) for name in remix.__all__} == dict.fromkeys(remix.__all__, True)
    assert remix._HOMES.keys() == set(remix.__all__)


@pytest.mark.parametrize("folder", ["remix", "scripts", "tests"])
def test_no_file_and_no_function_is_long(folder: str) -> None:
    """At most 400 lines and 60."""
    long: list[str] = []
    for file in sorted((PACKAGE.parent / folder).rglob("*.py")):
        source, where = file.read_text(encoding="utf-8"), file.relative_to(PACKAGE.parent)
        if len(source.splitlines()) > 400:
            long.append(f"{where}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 60:
                long.append(f"{where}: {node.name}")
    assert long == []
