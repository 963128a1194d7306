"""Recipes: bytes, YAML of any shape, and the repository's own after an accident."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import yaml
from hypothesis import strategies as st

from remix.config import Block, RecipeError, dump_recipe, load_recipe, parse_recipe
from remix.training.plan import make_plan
from tests.fuzz.harness import Outcome, Tools

RECIPES = Path(__file__).parents[2] / "recipes"
CORPUS = [
    path.read_text(encoding="utf-8")
    for path in sorted(RECIPES.rglob("*.yaml"))
    if path.relative_to(RECIPES).parts[0] != "accelerate"
]
RICH = """
run_dir: runs/rich
seed: 3
steps: 60
model: {path: org/model, dtype: bfloat16, size: {parameters: 1000000, hidden_size: 64, num_layers: 2, vocab_size: 512}}
adapter: {type: lora, rank: 8, alpha: 16.0, targets: [q_proj, v_proj], dora: false}
tasks:
  - {type: jsonl, path: ./problems.jsonl, eval_path: ../held_out.jsonl, limit: 4000, exclude: [math500]}
  - {type: hub, path: org/data, split: train, weight: 0.5}
prompt: {template: "Q: {problem}", chat: never, max_tokens: 128}
rewards:
  - {type: math, timeout: 2.5, workers: 1}
  - {type: format, weight: 0.1}
  - {type: length, free_tokens: 100, max_tokens: 200}
  - {type: python, function: "rewards:mine"}
rollout: {engine: {type: vllm, kv_cache_gib: 0.5}, group_size: 4, max_tokens: 256, refill: {max_rounds: 2}}
batch: {prompts: 64, minibatches: 4}
advantage: {type: dr_grpo}
objective: {type: gspo, aggregate: constant, constant: 256.0}
kl: {weight: 0.01, estimator: k2, place: loss, lambda_schedule: {start: 1.0, hold: 5, floor: 0.5}}
phases:
  - {type: mix_policy, lag_distribution: age, until: [{type: rollouts, after: 2000}, {type: kl_budget, nats: 0.5}]}
  - {type: mix_policy, until: [{type: reward_plateau, window: 3}, {type: length_drop}, {type: steps, after: 20}]}
  - {type: on_policy}
optimizer: {lr: 1.0e-5, schedule: cosine, warmup_steps: 2, betas: [0.9, 0.95]}
eval: {every: 5, benchmarks: [math500], limit: 10, samples: 2, temperature: 0.6, top_p: 0.95}
"""
CORPUS.append(RICH)
LONGEST_MESSAGE = 20_000

Draw = Any
"""What a composite strategy draws with."""
Loaded = tuple[bytes, list[str]]
"""A file and the overrides beside it."""

# --- what must hold -----------------------------------------------------------------------------------------------


def check_recipe(tools: Tools, loaded: Loaded) -> Outcome:
    return "refused" if _load(tools, loaded) is None else "accepted"


def check_plan(tools: Tools, loaded: Loaded) -> Outcome:
    recipe = _load(tools, loaded)
    if recipe is None:
        return "refused"
    try:
        plan = make_plan(recipe, world_size=2)
    except ValueError:
        return "refused"
    assert plan.steps == recipe.last_step
    return "accepted"


def _load(tools: Tools, loaded: Loaded) -> Any:
    content, overrides = loaded
    path = tools.folder / "recipe.yaml"
    path.write_bytes(content)
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        message = str(error)
        assert 0 < len(message) <= LONGEST_MESSAGE
        assert all(char.isprintable() or char == "\n" for char in message), "can be shown on any terminal"
        return None
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    return recipe


# --- values -------------------------------------------------------------------------------------------------------


def _blocks(base: type[Block] = Block) -> Iterator[type[Block]]:
    yield base
    for block in base.__subclasses__():
        yield from _blocks(block)


def _choices(annotation: Any) -> Iterator[str]:
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from _choices(part)


KEYS = sorted({name for block in _blocks() for name in block.model_fields})
TAGS = sorted(
    {tag for block in _blocks() for field in block.model_fields.values() for tag in _choices(field.annotation)}
)

SURROGATES = st.text(st.characters(categories=["Cs", "Lu", "Nd"]), max_size=4)
HUGE = st.builds(
    lambda sign, base, power: sign * base**power,
    st.sampled_from([1, -1]),
    st.sampled_from([2, 10]),
    st.integers(60, 5000),
)
"""Up to more digits than Python writes out."""
ODD_TEXT = st.sampled_from(
    ["1e-5", "1e400", "9" * 5000, "0x" + "f" * 5000, ".inf", "nan", "~", "", "{problem}", "./x", "../" * 40, "a/b/c"]
) | st.sampled_from(
    ["x" * 5000, "a\0b", "²", "٣", "(", "(a+)+$", "\x1b[31m", "\u2028", "=", "<<", "2001-99-99", "1:60:60"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5000),
    st.floats(0, 1),
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, 1e308, 5e-324, -0.0]),
    HUGE,
    st.text(max_size=8),
    SURROGATES,
    ODD_TEXT,
    st.sampled_from(KEYS + TAGS),
    st.dates(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5) | st.integers() | SURROGATES, inner, max_size=4)
    ),
    max_leaves=8,
)


class _Dumper(yaml.SafeDumper):
    """Writes numbers of any length."""


_Dumper.add_representer(
    int,
    lambda dumper, value: dumper.represent_scalar(
        "tag:yaml.org,2002:int", hex(value) if abs(value) > 2**99 else str(value)
    ),
)


def dumped(data: Any, **style: Any) -> str:
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, **style))


# --- accidents ----------------------------------------------------------------------------------------------------


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and index, as a path from the root."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield (*path, key)
        yield from _places(node[key], (*path, key))


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def _mutate(draw: Draw, data: dict[str, Any]) -> None:
    path = draw(st.sampled_from(list(_places(data)) or [()]))
    if not path:
        return
    parent, key = _at(data, path[:-1]), path[-1]
    value = parent[key]
    match draw(
        st.sampled_from(["near", "near", "near", "replace", "drop", "rename", "add", "repeat", "swap", "deepen"])
    ):
        case "near":
            parent[key] = draw(_near(value))
        case "replace":
            parent[key] = draw(VALUES)
        case "drop":
            del parent[key]
        case "rename" if isinstance(parent, dict):
            cut = draw(st.integers(0, len(str(key))))
            parent[str(key)[:cut] + draw(st.text(max_size=2)) + str(key)[cut + 1 :]] = parent.pop(key)
        case "add" if isinstance(parent, dict):
            parent[draw(st.sampled_from(KEYS) | st.text(max_size=5))] = draw(VALUES)
        case "repeat" if isinstance(parent, list):
            parent[key:key] = [deepcopy(value)] * draw(st.integers(1, 40))
        case "swap":
            other = draw(st.sampled_from(list(_places(data))))
            parent[key] = deepcopy(_at(data, other))
        case "deepen":
            for _ in range(draw(st.sampled_from([1, 2, 40, 90]))):
                parent[key] = {"size": parent[key]} if draw(st.booleans()) else [parent[key]]


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Of the same kind, so that what results may well be a recipe."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(1, 4 * abs(value) + 8) | st.sampled_from([0, -value, 2**31, 2**62, 2**63, 2**64])
    if isinstance(value, float):
        return st.floats(0, 1) | st.floats(0, 1e300) | st.sampled_from([math.inf, math.nan, str(value), "1e300"])
    if isinstance(value, str):
        return st.sampled_from(TAGS) | st.text(max_size=300) | ODD_TEXT
    if isinstance(value, list) and value:
        return st.integers(0, 12).map(lambda times: value * times)
    return SCALARS


@st.composite
def damaged_data(draw: Draw) -> dict[str, Any]:
    data = yaml.safe_load(draw(st.sampled_from(CORPUS)))
    assert isinstance(data, dict)
    for _ in range(draw(st.integers(1, 3))):
        _mutate(draw, data)
    return data


SNIPPETS = [
    "&a ",
    "*a",
    "<<: *a\n",
    "<<: [*a, *a]\n",
    "!!int ",
    "!!float x",
    "!!timestamp x",
    "!!bool x",
    "!!set ",
    "? ",
    "- ",
    ": ",
]
SNIPPETS += [
    "\t",
    "\0",
    "\ufeff",
    "\r\n",
    "'",
    '"',
    "\\ud800",
    "{",
    "}",
    "[",
    "]",
    "|\n",
    "%YAML 9.9\n---\n",
    "---\n",
    "...",
    "0x_",
    "0b",
    "2001-99-99",
]
SNIPPETS += ["[" * 5000, "{a: " * 2000, "- " * 3000, "9" * 5000, "x" * 100_000]


@st.composite
def damaged_text(draw: Draw) -> str:
    """Lines lost, doubled and swapped, and marks of YAML where they do not belong."""
    lines = draw(st.sampled_from(CORPUS)).splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["drop", "double", "move", "insert"])):
            case "drop" if len(lines) > 1:
                del lines[at]
            case "double":
                lines.insert(draw(st.integers(0, len(lines))), lines[at])
            case "move":
                lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(at))
            case "insert":
                column = draw(st.integers(0, len(lines[at])))
                lines[at] = lines[at][:column] + draw(st.sampled_from(SNIPPETS)) + lines[at][column:]
    return "".join(lines)


@st.composite
def bombs(draw: Draw) -> str:
    """Aliases of aliases: a few lines that stand for billions of values."""
    levels, width = draw(st.integers(1, 60)), draw(st.integers(1, 9))
    opening, closing, joint = draw(st.sampled_from([("[", "]", ""), ("{<<: [", "]}", ""), ("{", "}", "k{}: ")]))
    first = draw(st.sampled_from(["x", "{y: 1}", "[1]", "*a0", "x" * 2000]))
    lines = [f"a0: &a0 {first}"]
    for level in range(1, levels):
        inside = ", ".join(f"{joint.format(number)}*a{level - 1}" for number in range(width))
        lines.append(f"a{level}: &a{level} {opening}{inside}{closing}")
    return "\n".join(lines) + f"\nmodel: *a{levels - 1}\n" + draw(st.sampled_from(["", CORPUS[0]]))


@st.composite
def overrides(draw: Draw) -> list[str]:
    data = yaml.safe_load(RICH)
    dotted = st.sampled_from([".".join(map(str, path)) for path in _places(data)])
    name = st.sampled_from(KEYS) | st.integers(-1, 3).map(str) | st.sampled_from(["²", "٣", "9" * 5000, "", " "])
    key = dotted | st.lists(name, max_size=4).map(".".join) | st.builds("{}.{}".format, dotted, name) | SURROGATES
    plain = VALUES.map(lambda value: dumped(value, default_flow_style=True))
    value = plain | st.integers(1, 300).map(str) | st.sampled_from(SNIPPETS + TAGS) | ODD_TEXT
    near = st.sampled_from(list(_places(data))).flatmap(
        lambda path: _near(_at(data, path)).map(
            lambda value: f"{'.'.join(map(str, path))}={dumped(value, default_flow_style=True)}"
        )
    )
    wild = st.builds("{}={}".format, key, value) | st.text(max_size=9)
    return draw(st.lists(near, min_size=1, max_size=3) | st.lists(near | wild, min_size=1, max_size=3))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def flipped(draw: Draw, content: bytes) -> bytes:
    """A part of the content, some of its bytes changed."""
    damaged = bytearray(content[: draw(st.integers(0, len(content)))])
    for _ in range(draw(st.integers(0, 5))):
        if damaged:
            damaged[draw(st.integers(0, len(damaged) - 1))] = draw(st.integers(0, 255))
    return bytes(damaged)


def _alone(content: st.SearchStrategy[bytes]) -> st.SearchStrategy[Loaded]:
    return st.tuples(content, st.just([]))


DAMAGED = damaged_data().map(lambda data: _encoded(dumped(data))) | damaged_text().map(_encoded)
BYTES = _alone(st.binary(max_size=400) | st.sampled_from(CORPUS).flatmap(lambda text: flipped(text.encode())))
TEXT = _alone(
    (
        VALUES.map(dumped)
        | bombs()
        | st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=6), max_size=9).map("".join)
    ).map(_encoded)
)
MUTATED = _alone(DAMAGED)
OVERRIDDEN = st.tuples(st.just(RICH.encode()), overrides())
