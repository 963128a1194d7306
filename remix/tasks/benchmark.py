"""What a benchmark is: a few lines of YAML in `eval/`, one file each, and suites that name several.

A definition fixes all that a score depends on beside the model: problems, prompt, sampling and grader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from remix.config import LogConfig
from remix.config.block import Block, Fraction, nearest
from remix.config.data import ShapesKind

SUITES = "suites"
"""Stem of the file that names the suites."""
PACKAGE = Path(__file__).resolve().parents[1]


class Fields(Block):
    """Columns of a data set."""

    problem: str = "problem"
    answer: str = "answer"
    """A text or number, or a list of them, each of which is accepted."""
    id: str | None = "id"
    """null: problems are numbered in their order."""
    images: str | None = None
    """Of a local file: a path, or a list of them, relative to the file's folder."""


class AnswerForm(Block):
    """From a cell to the gold answer."""

    after: str | None = None
    """The answer is what follows the last of these, where there is one."""
    remove: tuple[str, ...] = ()
    """Taken out wherever they stand."""
    integer: bool = False
    """Answers are integers, which sources write as 33, 033 or 33.0."""


class HubSource(Block):
    """A data set of the hub."""

    path: str
    name: str | None = None
    revision: str | None = None
    """null: not pinned; what was loaded is then reported with the scores."""
    split: str
    fields: Fields = Fields()
    drop: Mapping[str, tuple[str | int, ...]] = {}
    """By column, the values whose rows are left out."""
    count: PositiveInt | None = None
    """Where it differs from that of the benchmark."""


class Generated(Block):
    """Held-out problems of the arithmetic task."""

    kinds: tuple[str, ...] = ("sum",)
    min_terms: PositiveInt = 3
    max_terms: PositiveInt = 5
    seed: NonNegativeInt = 0


class GeneratedShapes(Block):
    """Held-out pictures of the shapes task, as many of each kind."""

    shapes: Annotated[tuple[ShapesKind, ...], Field(min_length=1)]
    seed: NonNegativeInt = 0


class MathGrader(Block):
    """Mathematical equality of the final answer."""

    type: Literal["math"] = "math"
    rel_tolerance: NonNegativeFloat = 0.0
    """Numbers within this share of the gold are equal; 0: exact values."""


class ExactMatchGrader(Block):
    """The answer is the gold, character by character."""

    type: Literal["exact_match"] = "exact_match"
    after: str | None = None
    """The answer is what follows the last of these; null: the whole response."""


class Benchmark(Block):
    name: str
    title: str
    source: str
    """Where the problems come from."""
    licence: str
    count: PositiveInt
    """Problems that there have to be."""
    hub: HubSource | None = None
    file: str | None = None
    """Name of the local form: JSON lines, plain or with .gz."""
    generate: GeneratedShapes | Generated | None = None
    fields: Fields = Fields()
    """Columns of `file`."""
    answer: AnswerForm = AnswerForm()
    template: str
    """What is put around a problem; {problem} is replaced, all else stays as it is."""
    system: str | None = None
    grader: Annotated[MathGrader | ExactMatchGrader, Field(discriminator="type")]
    samples: PositiveInt = 1
    """Responses to a problem."""
    temperature: NonNegativeFloat
    """0: greedy."""
    top_p: Annotated[Fraction, Field(gt=0.0)] = 1.0
    max_tokens: PositiveInt
    """Of a response."""
    reflection: tuple[str, ...] = LogConfig().reflection_patterns
    """A response that holds one of these (case ignored) counts as self-reflecting."""
    notes: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "{problem}" not in self.template:
            raise ValueError("template must contain {problem}, where the problem's text goes")
        if (self.generate is not None) == (self.hub is not None or self.file is not None):
            raise ValueError("problems come from `generate`, or else from `hub`, `file` or both")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"at temperature 0 all {self.samples} samples are the same: raise it, or set samples to 1")
        return self


def definitions_dir() -> Path:
    """Where the definitions lie: inside an installed package, or at the root of a checkout."""
    installed = PACKAGE / "_eval"
    return installed if installed.is_dir() else PACKAGE.parent / "eval"


def benchmark_names() -> list[str]:
    """Every benchmark that has a definition."""
    return sorted(path.stem for path in definitions_dir().glob("*.yaml") if path.stem != SUITES)


def suites() -> dict[str, tuple[str, ...]]:
    """By name, the benchmarks of each suite."""
    return {name: tuple(members) for name, members in _read(definitions_dir() / f"{SUITES}.yaml").items()}


def load_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, suites and comma-separated lists, in order, each once.

    Raises ValueError on an unknown name, naming the nearest.
    """
    return [load_definition(definitions_dir() / f"{name}.yaml") for name in dict.fromkeys(_expanded(names))]


def load_definition(path: Path) -> Benchmark:
    """One definition file. Raises ValueError with one line a problem."""
    try:
        benchmark = Benchmark.model_validate(_read(path))
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(map(str, (*problem['loc'], '')))[:-1]}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise ValueError("\n".join(problems)) from None
    if benchmark.name != path.stem:
        raise ValueError(f"{path}: its name is '{benchmark.name}'; name the file {benchmark.name}.yaml")
    return benchmark


def _expanded(names: Sequence[str]) -> Iterator[str]:
    known, groups = benchmark_names(), suites()
    asked = [name.strip() for joined in names for name in joined.split(",") if name.strip()]
    if not asked:
        raise ValueError(f"name a benchmark ({', '.join(known)}) or a suite ({', '.join(groups)})")
    for name in asked:
        if name not in known and name not in groups:
            raise ValueError(f"unknown benchmark '{name}'; {nearest(name, [*known, *groups])}")
        yield from groups.get(name, (name,))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"{path}: no such definition") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a mapping of keys is expected, this holds {type(data).__name__}")
    return data
