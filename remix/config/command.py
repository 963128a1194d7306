"""`remix schema`: what may stand in a recipe, for an editor or for a reader."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SCHEMA_FILE, REFERENCE_FILE = "recipe.schema.json", "recipe.md"


def add_schema(commands: Any) -> None:
    schema = commands.add_parser(
        "schema",
        usage="remix schema [--markdown | --out DIR]",
        help="the keys of a recipe, as JSON Schema for editors or as a page",
        description="Prints the JSON Schema of a recipe's file. Where that is saved, an editor with a YAML language "
        "server checks a recipe that begins with `# yaml-language-server: $schema=PATH`.",
    )
    schema.set_defaults(command=_schema)
    form = schema.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="every key with its values, default and meaning, instead")
    form.add_argument(
        "--out", type=Path, metavar="DIR", help=f"write both, as {SCHEMA_FILE} and {REFERENCE_FILE}, into a folder"
    )


def _schema(args: argparse.Namespace, *_: Any) -> int:
    from remix.config.schema import recipe_reference, recipe_schema

    schema = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    if args.out is None:
        print(recipe_reference() if args.markdown else schema, end="")
        return 0
    if not args.out.is_dir():
        raise ValueError(f"--out {args.out}: no such folder")
    (args.out / SCHEMA_FILE).write_text(schema, encoding="utf-8")
    (args.out / REFERENCE_FILE).write_text(recipe_reference(), encoding="utf-8")
    return 0
