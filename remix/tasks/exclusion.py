"""Training sets without the problems of benchmarks.

Problems are compared by their letters and digits alone, since copies differ in spaces, dollar signs and punctuation,
and by the runs of 13 words that they share, since copies are reworded. Short problems that differ in a sign only count
as the same, which costs a training problem and not a clean score.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from remix.formats import refuse_pickled
from remix.tasks.benchmark import load_benchmarks
from remix.tasks.jsonl import read_rows
from remix.tasks.problems import load_problems
from remix.tasks.rows import problem_text, text
from remix.types import Prompt

SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
"""By which a file is told from the name of a benchmark."""


RUN = 13
"""Words of a run; the length that the GPT-3 report (arXiv 2005.14165) searched its training set by."""
Run = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exclusion:
    """What training leaves out."""

    texts: frozenset[str]
    """Problems, as `normalised` writes them."""
    ids: frozenset[str]
    """Ids of the training set itself."""
    runs: Mapping[Run, Sequence[int]]
    """By run of words, the numbers of the problems that it occurs in; empty where overlap does not count."""
    needed: Sequence[int]
    """By problem, how many of its runs make another problem its copy."""

    def without(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that are none of these, in order."""
        return [prompt for prompt in prompts if prompt.id not in self.ids and not self._holds(problem_text(prompt))]

    def _holds(self, problem: str) -> bool:
        if normalised(problem) in self.texts:
            return True
        shared = Counter(number for run in word_runs(problem) for number in self.runs.get(run, ()))
        return any(count >= self.needed[number] for number, count in shared.items())


def load_exclusion(entries: Sequence[str], data_dir: str | None = None, overlap: float | None = None) -> Exclusion:
    """From names of benchmarks and suites, files of problems, and lists of ids.

    `overlap` is the share of a problem's runs that makes another one its copy. Raises ValueError on an unknown name, a
    missing file, or a benchmark that cannot be loaded whole.
    """
    problems, ids = list[str](), set[str]()
    for entry in entries:
        refuse_pickled(entry, "list ids as .json, problems as .jsonl")
        if not entry.endswith(SUFFIXES):
            folder = Path(data_dir) if data_dir is not None else None
            for benchmark in load_benchmarks([entry]):
                problems.extend(problem_text(prompt) for prompt in load_problems(benchmark, folder).prompts)
        elif entry.endswith(".json"):
            ids.update(_listed(Path(entry)))
        else:
            problems.extend(text(row, "problem", "problem", where) for where, row in read_rows(Path(entry)))
    runs: dict[Run, list[int]] = {}
    needed: list[int] = []
    for number, own in enumerate(word_runs(problem) for problem in problems if overlap is not None):
        needed.append(ceil((overlap or 1.0) * len(own)))
        for run in own:
            runs.setdefault(run, []).append(number)
    # A text without letters and digits says nothing.
    return Exclusion(frozenset(filter(None, map(normalised, problems))), frozenset(ids), runs, needed)


def normalised(problem: str) -> str:
    """Its letters and digits, case ignored."""
    return "".join(_WORD.findall(problem.casefold()))


def word_runs(problem: str) -> set[Run]:
    """Every run of 13 words in it, case ignored; none where it is shorter."""
    words = _WORD.findall(problem.casefold())
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


_WORD = re.compile(r"[^\W_]+")


class _Found(BaseModel):
    exact: list[tuple[str, str]]
    """Pairs of an id in the benchmark and one in the training set."""


_IDS: TypeAdapter[list[str] | dict[str, dict[str, _Found]]] = TypeAdapter(list[str] | dict[str, dict[str, _Found]])
"""A list of ids, or a report: by training set and benchmark, what was found."""


def _listed(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; relative paths start at the working directory, {Path.cwd()}")
    try:
        found = _IDS.validate_json(path.read_bytes())
    except ValidationError:
        raise ValueError(
            f"{path}: neither a list of ids nor a report "
            '{training set: {benchmark: {"exact": [[id in the benchmark, id in the training set], ...]}}}'
        ) from None
    if isinstance(found, list):
        yield from found
        return
    for of_set in found.values():
        for of_benchmark in of_set.values():
            yield from (training_id for _, training_id in of_benchmark.exact)
