"""The problems of a benchmark, from a local copy, the hub or a generator, checked against its definition."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from remix.tasks.arithmetic import generate
from remix.tasks.benchmark import AnswerForm, Benchmark, Fields, GeneratedShapes, HubSource
from remix.tasks.hub import load_rows, loaded_revision, narrowed
from remix.tasks.jsonl import read_rows
from remix.tasks.rows import Row, cell, images_of, text
from remix.tasks.shapes import make_prompts
from remix.types import Prompt


@dataclass(frozen=True, slots=True)
class Problems:
    """The problems of one benchmark and where they come from."""

    prompts: tuple[Prompt, ...]
    """One a problem, ids "benchmark/row id", not encoded yet; `answer` is the first gold."""
    golds: tuple[tuple[str, ...], ...]
    """By prompt, the answers of which any one is right; more than one only where a source lists several."""
    source: str
    """For reports: a file, a data set of the hub, or "generated"."""
    revision: str | None
    """Commit of the hub's data set, or "sha256:..." of a local file; None where neither is known."""
    sha256: str
    """Of problems and golds in order, whatever the source: equal hashes mean equal questions."""


def load_problems(benchmark: Benchmark, data_dir: Path | None = None) -> Problems:
    """From `data_dir` where it is given, else from the hub. Raises ValueError on a missing file or a wrong count."""
    if benchmark.generate is not None:
        return _generated(benchmark)
    if data_dir is not None and benchmark.file is not None:
        path = _local(benchmark, benchmark.file, data_dir)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return _problems(benchmark, read_rows(path), benchmark.fields, str(path), f"sha256:{digest}", benchmark.count)
    if benchmark.hub is None:
        raise ValueError(
            f"{benchmark.name} has no data set on the hub: name the directory that holds {benchmark.file} (--data-dir)"
        )
    hub = benchmark.hub
    rows = load_rows(hub.path, name=hub.name, revision=hub.revision, split=hub.split)
    revision = hub.revision or loaded_revision(rows)
    columns = [hub.fields.problem, hub.fields.answer, *([] if hub.fields.id is None else [hub.fields.id]), *hub.drop]
    rows = narrowed(rows, columns)
    source = f"{hub.path}{f' ({hub.name})' if hub.name else ''}, {hub.split}"
    numbered = ((f"{hub.path} ({hub.split}), row {number}", row) for number, row in enumerate(rows))
    return _problems(benchmark, _kept(numbered, hub), hub.fields, source, revision, hub.count or benchmark.count)


def _generated(benchmark: Benchmark) -> Problems:
    chosen = benchmark.generate
    assert chosen is not None
    if isinstance(chosen, GeneratedShapes):
        each = benchmark.count // len(chosen.shapes)
        prompts = [prompt for kind in chosen.shapes for prompt in make_prompts(kind, "test", each, chosen.seed)]
        names = [prompt.id.removeprefix("shapes/") for prompt in prompts]
    else:
        prompts = generate(
            kinds=chosen.kinds,
            min_terms=chosen.min_terms,
            max_terms=chosen.max_terms,
            split="test",
            size=benchmark.count,
            seed=chosen.seed,
        )
        names = [prompt.id.rpartition("/")[2] for prompt in prompts]
    rows = [
        (prompt.id, {"id": name, "problem": prompt.content, "answer": prompt.answer})
        for name, prompt in zip(names, prompts, strict=True)
    ]
    images = [prompt.images for prompt in prompts]
    return _problems(benchmark, rows, Fields(), "generated", None, benchmark.count, images)


def _local(benchmark: Benchmark, name: str, data_dir: Path) -> Path:
    for path in (data_dir / name, data_dir / f"{name}.gz"):
        if path.is_file():
            return path
    remedy = f", or leave the directory out to load {benchmark.hub.path} from the hub" if benchmark.hub else ""
    raise ValueError(f"{data_dir / name}: no such file; put the problems of {benchmark.name} there{remedy}")


def _kept(rows: Iterable[Row], hub: HubSource) -> Iterator[Row]:
    for where, row in rows:
        if not any(cell(row, "drop", column, where) in values for column, values in hub.drop.items()):
            yield where, row


def _problems(
    benchmark: Benchmark,
    rows: Iterable[Row],
    fields: Fields,
    source: str,
    revision: str | None,
    count: int,
    images: Sequence[tuple[str, ...]] | None = None,
) -> Problems:
    """`images`: of generated problems, in order; others name them in a column."""
    prompts: list[Prompt] = []
    golds: list[tuple[str, ...]] = []
    for number, (where, row) in enumerate(rows):
        identity = str(number) if fields.id is None else text(row, "id", fields.id, where)
        accepted = tuple(_gold(answer, benchmark.answer, where) for answer in _answers(row, fields.answer, where))
        prompts.append(
            Prompt(
                id=f"{benchmark.name}/{identity.removeprefix(f'{benchmark.name}/')}",
                content=text(row, "problem", fields.problem, where),
                answer=accepted[0],
                task=benchmark.name,
                images=images_of(row, fields.images, where) if images is None else images[number],
            )
        )
        golds.append(accepted)
    if len(prompts) != count:
        raise ValueError(
            f"{source}: {len(prompts)} problems, but {benchmark.name} has {count}; "
            "this is another or an incomplete copy, and its score would not be comparable"
        )
    if len({prompt.id for prompt in prompts}) < count:
        raise ValueError(f"{source}: some ids of {benchmark.name} occur more than once; set its `fields.id` to null")
    return Problems(tuple(prompts), tuple(golds), source, revision, _digest(prompts, golds))


def _answers(row: Mapping[str, Any], column: str, where: str) -> list[str]:
    """The golds of a row: every entry of a list, or the one that is there."""
    found = cell(row, "answer", column, where)
    listed = found if isinstance(found, list) and found else [found]
    return [text({**row, column: answer}, "answer", column, where) for answer in listed]


def _gold(answer: str, form: AnswerForm, where: str) -> str:
    """The answer in the form that graders read."""
    if form.after is not None:
        answer = answer.rpartition(form.after)[2]
    for unwanted in form.remove:
        answer = answer.replace(unwanted, "")
    answer = answer.strip()
    if form.integer:
        found = re.fullmatch(r"([+-]?\d+)(?:\.0*)?", answer)
        if found is None:
            raise ValueError(f"{where}: the answer {answer!r} is not an integer, as those of this benchmark are")
        return str(int(found[1]))
    if not answer:
        raise ValueError(f"{where}: the answer is empty")
    return answer


def _digest(prompts: list[Prompt], golds: list[tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for prompt, accepted in zip(prompts, golds, strict=True):
        # By their names: a copy in another folder is the same benchmark.
        seen = [[PurePath(reference).name for reference in prompt.images]] if prompt.images else []
        digest.update(json.dumps([prompt.content, *accepted, *seen], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
