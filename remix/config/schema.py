"""The recipe as a JSON Schema, for editors, and as the reference of its keys, for people. Both say what code says."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from remix.config.block import Block
from remix.config.recipe import Recipe

Schema = Mapping[str, Any]


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe's file. It knows blocks, keys and values; what blocks say of one another is
    checked when a recipe is read."""
    schema = Recipe.model_json_schema(schema_generator=_Generator)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


class _Generator(GenerateJsonSchema):
    """What stands below a key in the code is its description."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # an editor would show it in place of the key

    def model_schema(self, schema: Any) -> dict[str, Any]:
        made, block = super().model_schema(schema), schema["cls"]
        texts = _texts_below_keys(block)
        for key, value in made["properties"].items():
            if key in texts:
                value["description"] = texts[key]
        kind = made["properties"].get("type")
        if kind is not None and "const" in kind:
            # A default of its class; in a file it is what tells one block from another.
            del kind["default"]
            made["required"] = [*made.get("required", ()), "type"]
        return made


def _texts_below_keys(block: type[Block]) -> dict[str, str]:
    """Read from the source when they are asked for: pydantic would do it whenever a recipe's module is imported."""
    texts = {}
    for cls in reversed([cls for cls in block.__mro__ if issubclass(cls, Block)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[key] = inspect.cleandoc(text)
    return texts


# --- for people ---------------------------------------------------------------------------------------------------

_HEAD = """\
# Recipe keys

Written by `remix schema --out docs`, from the code. A recipe is a YAML file of these keys. Any of them can be set on
the command line, dotted, with an index into lists: `optimizer.lr=2e-6`, `phases.0.utd_ratio=4`. Where a block has a
`type`, that selects which keys it has. An unknown key is refused with the nearest valid name, and blocks that
contradict one another with the remedy. [`concepts.md`](concepts.md) explains those of ReMix.

[`recipe.schema.json`](recipe.schema.json) is the same for editors. One with a YAML language server (VS Code with the
YAML extension, Neovim, Helix, Zed) completes and checks a recipe that begins with the file's place, relative to it:

```yaml
# yaml-language-server: $schema=recipe.schema.json
```

`remix schema > recipe.schema.json` writes the file anywhere.
"""


def recipe_reference() -> str:
    """Markdown: a table of keys for each block, in the order in which a recipe has them."""
    schema = recipe_schema()
    return "\n".join([_HEAD, *_Sections(schema["$defs"]).of("", schema), ""])


class _Sections:
    def __init__(self, blocks: Mapping[str, Schema]) -> None:
        self._blocks = blocks
        self._places: dict[str, str] = {}
        """Of the blocks that have their section: one that may stand in several places has it in the first."""

    def of(self, path: str, block: Schema) -> Iterator[str]:
        """A block's keys, then the blocks in it. `path`: dotted, as an override names it."""
        rows, inner = [], list[tuple[str, str]]()
        required = block.get("required", ())
        for key, value in block["properties"].items():
            if key == "type" and "const" in value:
                continue
            names = list(_names(value))
            for name in names:
                place = ".".join(filter(None, (path, key, "0" if _is_list(value) else "")))
                if name not in self._places:
                    self._places[name] = place
                    inner.append((place, name))
            chosen = [self._blocks[name] for name in names]
            shown = self._links(names) if names else _type(value)
            default = "**required**" if key in required else _default(value)
            text = value.get("description") or chosen[0]["description"].split("\n\n")[0]
            said = _cell(text).replace("*", "\\*")  # 6*7*8 is no emphasis
            rows.append(f"| `{key}` | {shown} | {default} | {said} |")
        if rows:
            yield from ["| key | value | default | |", "|---|---|---|---|", *rows, ""]
        for place, name in inner:
            found = self._blocks[name]
            yield from [f"## {_title(place, found)}", "", found["description"], "", *self.of(place, found)]

    def _links(self, names: Sequence[str]) -> str:
        blocks = [(self._blocks[name], self._places[name]) for name in names]
        links = [f"[{_kind(block) or 'keys'}](#{_anchor(_title(place, block))})" for block, place in blocks]
        return f"`type`: {', '.join(links)}" if _kind(blocks[0][0]) else links[0]


def _title(path: str, block: Schema) -> str:
    kind = _kind(block)
    return f"`{path}: {{type: {kind}}}`" if kind else f"`{path}`"


def _anchor(title: str) -> str:
    """What GitHub makes of a title."""
    return "".join(char for char in title.lower() if char.isalnum() or char in "_- ").replace(" ", "-")


def _kind(block: Schema) -> str | None:
    """What its `type` has to be, where that selects it."""
    kind: str | None = block["properties"].get("type", {}).get("const")
    return kind


def _choices(value: Schema) -> list[Schema]:
    """All that a value may be, but null."""
    return [choice for choice in value.get("anyOf", value.get("oneOf", [value])) if choice.get("type") != "null"]


def _is_list(value: Schema) -> bool:
    return any(choice.get("type") == "array" for choice in _choices(value))


def _names(value: Schema) -> Iterator[str]:
    """Of the blocks that a value may be, or may be a list of."""
    for choice in _choices(value):
        if "$ref" in choice:
            yield choice["$ref"].rpartition("/")[2]
        elif "items" in choice:
            yield from _names(choice["items"])
        elif choice is not value:
            yield from _names(choice)


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_NAMES = {"string": "text", "number": "number", "integer": "whole number", "boolean": "true or false"}


def _type(value: Schema) -> str:
    shown = [_one_type(choice) for choice in _choices(value)]
    return " or ".join([*shown, "null"] if len(value.get("anyOf", ())) > len(shown) else shown)


def _one_type(value: Schema) -> str:
    if "enum" in value:
        return " ".join(f"`{item}`" for item in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value["type"] == "array":
        items = value.get("prefixItems")
        return " and ".join(map(_type, items)) if items else f"list of {_type(value['items'])}"
    known = {bound: value[bound] for bound in _BOUNDS if bound in value}
    if "exclusiveMinimum" in known:
        known.pop("minimum", None)
    bounds = [f"{_BOUNDS[bound]} {limit:g}" for bound, limit in known.items()]
    return " ".join([_NAMES[value["type"]], ", ".join(bounds)]).strip()


def _default(value: Schema) -> str:
    default = value.get("default")
    if isinstance(default, dict):  # a block's own defaults stand in its section
        return f"`{default['type']}`" if "oneOf" in value else ""
    if isinstance(default, list) and any(isinstance(item, dict) for item in default):
        return f"one `{default[0]['type']}`"
    return f"`{_cell(_yaml(default))}`"


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
