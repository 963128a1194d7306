"""Files of JSON lines: problems, and the log of a run."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

from remix.config import JsonlTask
from remix.tasks.jsonl import load_jsonl, read_rows
from remix.tracking.run_log import RunLog, read_metrics
from remix.types import Prompt
from tests.fuzz.harness import Outcome, Tools

Draw = Any


@dataclass(frozen=True)
class Problems:
    """A file and how it is read."""

    content: bytes
    zipped: bool = False
    split: Literal["train", "test"] = "train"
    numbered: bool = False
    """No id column."""
    drop: bool = False
    """Rows without an answer are left out."""
    holdout: float = 0.0
    limit: int | None = None


def check_problems(tools: Tools, file: Problems) -> Outcome:
    path = tools.folder / ("problems.jsonl.gz" if file.zipped else "problems.jsonl")
    path.write_bytes(file.content)
    config = JsonlTask(
        path=str(path),
        id=None if file.numbered else "id",
        unanswered="drop" if file.drop else "error",
        holdout=file.holdout,
        limit=file.limit,
    )
    try:
        prompts = load_jsonl(config, file.split, "task")
    except ValueError as error:
        _names_its_line(error, path)
        return "refused"
    for prompt in prompts:
        _is_text(prompt)
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    try:
        rows = list(read_rows(path))
    except ValueError as error:
        assert file.limit is not None, "nothing was left unread"
        _names_its_line(error, path)
        return "accepted"
    assert all(isinstance(row, dict) for _, row in rows)
    assert len(prompts) <= len(rows)
    if not file.drop and not file.limit and not file.holdout and file.split == "train":
        assert len(prompts) == len(rows)
    return "accepted"


def _is_text(prompt: Prompt) -> None:
    turns = [prompt.content] if isinstance(prompt.content, str) else [turn["content"] for turn in prompt.content]
    for text in (*turns, prompt.answer, prompt.id):
        assert isinstance(text, str)
        text.encode()  # what holds half a surrogate pair cannot be tokenized, hashed or logged
    assert prompt.answer.strip()
    assert prompt.answer.lower() not in ("nan", "inf", "-inf") or prompt.answer != str(float(prompt.answer))


def _names_its_line(error: ValueError, path: Path) -> None:
    message = str(error)
    assert re.match(rf"{re.escape(str(path))}:\d+: ", message), message[:300]
    assert len(message) <= 5_000
    assert message.isprintable(), "one line that any terminal shows"


# --- files of problems --------------------------------------------------------------------------------------------

TEXT = st.text(max_size=12) | st.text(st.characters(categories=["Cs", "Cc", "Lu", "Nd"]), max_size=4)
CELLS = st.one_of(
    TEXT,
    TEXT,
    st.integers(-5, 5),
    st.sampled_from([float("nan"), float("inf"), 1e300, True, None, "", " ", 2**70]),
    st.floats(),
    st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]) | TEXT, "content": TEXT}), max_size=3),
    st.recursive(
        TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5
    ),
)
GOOD_ROWS = st.fixed_dictionaries(
    {"id": st.integers(0, 10**6).map(str), "problem": st.text(min_size=1), "answer": st.integers()}
)
ROWS = st.one_of(
    GOOD_ROWS,
    GOOD_ROWS,
    st.fixed_dictionaries({"id": CELLS, "problem": CELLS, "answer": CELLS}, optional={"more": CELLS}),
    st.dictionaries(st.sampled_from(["id", "problem", "answer", "problem_text"]) | TEXT, CELLS, max_size=5),
)
PIECES = [
    b'{"id": 1, "problem": "p", "answer": ' + cell + b"}"
    for cell in (b"9" * 5000, b"1e999", b"-" * 2, b"NaN", b'"\\ud800"', b'"\xff"')
]
PIECES += [
    b"[" * 100_000,
    b'{"a":' * 5_000,
    b'{"problem": "' + b"x" * 300_000 + b'"}',
    b"\xef\xbb\xbf{}",
    b"{}",
    b"\0",
    b"[]",
    b"nul",
    b" \t",
    b"\r",
]
PIECES += [
    b'{"id": 1, "id": 2, "problem": "p", "answer": "a"}',
    b"\x1f\x8b\x08",
    b'{"problem": "\xed\xa0\x80"}',
    b'{"' + b"k" * 50_000 + b'": 1}',
]


@st.composite
def _line(draw: Draw) -> bytes:
    return json.dumps(draw(ROWS), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def content(draw: Draw, line: st.SearchStrategy[bytes]) -> bytes:
    lines = draw(st.lists(line, max_size=5))
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\r"]))
    start = draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf"]))
    return start + end.join(lines) + draw(st.sampled_from([b"", end]))


@st.composite
def _zipped(draw: Draw, plain: bytes) -> bytes:
    """A gzip stream whole, cut short, changed, or followed by something else."""
    stream = bytearray(gzip.compress(plain, mtime=0))
    match draw(st.sampled_from(["whole", "cut", "flip", "more", "twice", "plain"])):
        case "cut":
            del stream[draw(st.integers(0, len(stream))) :]
        case "flip":
            stream[draw(st.integers(0, len(stream) - 1))] ^= 1 << draw(st.integers(0, 7))
        case "more":
            stream += draw(st.binary(max_size=9))
        case "twice":
            stream *= 2
        case "plain":
            return plain
    return bytes(stream)


@st.composite
def problems(draw: Draw, plain: st.SearchStrategy[bytes]) -> Problems:
    zipped, inside = draw(st.booleans()), draw(plain)
    return Problems(
        draw(_zipped(inside)) if zipped else inside,
        zipped,
        draw(st.sampled_from(["train", "train", "test"])),
        numbered=draw(st.booleans()),
        drop=draw(st.booleans()),
        holdout=draw(st.sampled_from([0.0, 0.0, 0.5])),
        limit=draw(st.sampled_from([None, None, 1, 2])),
    )


PROBLEM_BYTES = problems(st.binary(max_size=200))
PROBLEM_LINES = problems(content(_line() | _line() | _line() | st.sampled_from(PIECES)))

# --- the log of a run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """What a run logged, and what became of the file since."""

    metrics: list[dict[str, float]]
    phase: str
    cut: int | None
    """Bytes that a kill left."""
    flips: list[tuple[int, int]]
    """Where, and the new byte."""
    line: bytes | None
    """What stands between the lines."""


LOGS = st.builds(
    Log,
    st.lists(st.dictionaries(st.text(max_size=9), st.floats() | st.integers(), max_size=4), max_size=5),
    st.text(max_size=9) | st.sampled_from(["mix_policy", "\u2028", "\ud800"]),
    st.none() | st.integers(0, 400),
    st.just([]) | st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    st.none()
    | st.none()
    | st.binary(max_size=40)
    | st.sampled_from([*PIECES, b'{"step": null}', b'{"step": 1e999}', b"{}"]),
)


def check_log(tools: Tools, log: Log) -> Outcome:
    folder = tools.folder / "run"
    for name in ("metrics.jsonl", "completions.jsonl"):
        (folder / name).unlink(missing_ok=True)
    writer, path = RunLog(folder), folder / "metrics.jsonl"
    for step, metrics in enumerate(log.metrics):
        writer.log(step, log.phase, {f"m/{name}": value for name, value in metrics.items()})
    written, rows = path.read_bytes(), read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(len(log.metrics)))
    damaged = bytearray(written if log.line is None else written + log.line + b"\n" + written)
    for at, byte in log.flips:
        if at < len(damaged):
            damaged[at] = byte
    path.write_bytes(damaged[: log.cut])
    try:
        back = read_metrics(folder)
        RunLog(folder, from_step=2)
    except ValueError as error:
        assert damaged != written, "a last line cut short is left out"
        _names_its_line(error, path)
        return "refused"
    if damaged == written:
        whole = bytes(damaged[: log.cut]).count(b"\n")
        assert json.dumps(back) == json.dumps(rows[:whole])
    assert json.dumps(read_metrics(folder)) == json.dumps([row for row in back if row["step"] < 2])
    return "accepted"
