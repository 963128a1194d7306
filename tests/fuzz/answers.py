"""What a model writes as its answer, before the grader."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any, get_args

from hypothesis import strategies as st

from remix.rewards.answers.extract import extract
from remix.rewards.answers.judge import same_answer
from remix.rewards.answers.nodes import UnreadableError
from remix.rewards.answers.normalise import clean
from remix.rewards.answers.parse import parse
from remix.rewards.equivalence import gold_answer, quick_grade
from remix.types import Verdict
from tests.fuzz.harness import Outcome, Tools
from tests.rewards.grader_cases import CASES

Draw = Any

TIMEOUT = 2.0
"""Seconds of wall clock that the pool of the harness gives an answer."""
START_SECONDS = 20.0
"""What a new worker may take on a busy machine."""

# --- answers ------------------------------------------------------------------------------------------------------

KNOWN = sorted({text for cases in CASES.values() for gold, answer, _ in cases for text in (gold, answer)})
PIECES = sorted({piece for text in KNOWN for piece in re.findall(r"\\[A-Za-z]+|\\.|\d+|[A-Za-z]+|.", text)})
FRAMES = [
    r"\frac{%s}{%s}",
    r"\sqrt{%s}",
    r"\sqrt[%s]{%s}",
    "(%s, %s)",
    "[%s, %s)",
    r"\{%s, %s\}",
    "{%s}^{%s}",
    "%s_{%s}",
]
FRAMES += [
    r"\text{%s}",
    "|%s|",
    "%s = %s",
    r"%s \pm %s",
    "-%s",
    "%s!",
    r"\left(%s\right)",
    r"\boxed{%s}",
    r"\log_{%s} %s",
]
FRAMES += [
    r"\begin{pmatrix} %s & %s \\ %s & %s \end{pmatrix}",
    r"\binom{%s}{%s}",
    "%s %% %s",
    r"%s \cup %s",
    "%s^%s^%s",
]
FRAMES += [r"\sin %s", r"\lfloor %s \rfloor", r"%s \le x < %s", "%s:%s", "%s %s", r"%s\text{ cm}", "%s.%s", "%s,%s"]
ODD = [
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "1e5000",
    "1e-5000",
    "1e999999",
    "9" * 1900,
    "0." + "3" * 1900,
    "(" * 900,
    "{" * 900,
]
ODD += [
    "\0",
    "\x1b[0m",
    "\u202e",
    "\ud800",
    "½",
    "²",
    "٣",
    "𝟛",
    "10^{-5000}",
    r"\infty",
    "x^{10^9}",
    "1/0",
    "0^0",
    "0/0",
    "-0",
]
ODD += [
    r"\frac{1}{" * 200 + "2" + "}" * 200,
    "x" * 1999,
    "1," * 700,
    r"\pm 1" * 60,
    "2^" * 400 + "2",
    "1+" * 900 + "1",
    "||" * 90,
]
ODD += [
    r"\sqrt[0]{2}",
    r"\log_1 2",
    r"\log 0",
    r"\binom{-1}{10^{9}}",
    "(10^{9})!",
    "i^i",
    r"\tan \frac{\pi}{2}",
    r"\frac{0}{0}",
    "_" * 50,
]

LEAVES = st.one_of(
    st.sampled_from(KNOWN),
    st.sampled_from(KNOWN),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.integers(-(10**20), 10**20).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(str),
    st.sampled_from(ODD),
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "Sm", "Nd", "No", "Nl"]), max_size=4),
)


def _framed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def filled(frame: str, parts: list[str]) -> str:
        return frame % tuple(parts[: frame.replace("%%", "").count("%s")])

    return st.builds(filled, st.sampled_from(FRAMES), st.lists(inner, min_size=4, max_size=4))


@st.composite
def spoilt(draw: Draw) -> str:
    """A known answer with a piece lost, doubled or put in."""
    text = draw(st.sampled_from(KNOWN))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 4)))
        middle = draw(st.sampled_from(["", text[start:end] * 2, draw(st.sampled_from(PIECES)), draw(st.characters())]))
        text = text[:start] + middle + text[end:]
    return text


TEXTS = spoilt() | st.recursive(LEAVES, _framed, max_leaves=6)
PAIRS = st.tuples(TEXTS, TEXTS) | st.sampled_from(
    [(gold, answer) for cases in CASES.values() for gold, answer, _ in cases]
)

RESPONSES = [
    r"\boxed{%s}",
    r"So \boxed{%s} holds.",
    "The answer is $%s$.",
    "The answer is %s",
    "<answer>%s</answer>",
    "#### %s",
    "%s",
]
RESPONSES += [
    r"<think>%s</think> \boxed{%s}",
    r"<think> \boxed{%s}",
    r"\boxed{%s",
    r"\boxed{\boxed{%s}} and \boxed{%s}",
    "$$%s$$",
    r"\[%s\]",
]

# --- in this process ----------------------------------------------------------------------------------------------


def check_text(tools: Tools, case: tuple[str, str, str]) -> Outcome:
    """What is linear or bounded by design: finding, reading and comparing answers without computer algebra."""
    gold, answer, frame = case
    found = extract(frame.replace("%s", answer))
    assert found is None or (found and isinstance(found, str))
    grade = quick_grade([gold], found)
    assert grade is None or grade.verdict in ("correct", "wrong", "no_answer")
    assert isinstance(gold_answer(gold), str)
    if len(gold) > 2_000 or len(answer) > 2_000:
        return "refused"
    for text in (gold, answer):
        assert same_answer(text, text) is not False or not clean(text), "an answer is itself"
    assert same_answer(gold, answer) in (True, False, None)
    _spelled_otherwise(gold)
    return "accepted" if reads(gold) and reads(answer) else "refused"


def reads(text: str) -> bool:
    try:
        parse(clean(text))
    except (UnreadableError, RecursionError):
        return False
    return True


def _spelled_otherwise(gold: str) -> None:
    """What is read stays the same answer in other dress."""
    if reads(gold):
        for frame in (r"\displaystyle %s", r"\,%s\,", "$%s$", " %s "):
            assert same_answer(gold, frame.replace("%s", gold)) is not False, frame


# --- through the pool ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    golds: list[list[str]]
    responses: list[str]
    tolerance: float | None


@st.composite
def exams(draw: Draw) -> Exam:
    golds, responses = [], []
    for _ in range(draw(st.integers(1, 5))):
        gold, answer = draw(PAIRS)
        golds.append([gold, *draw(st.lists(TEXTS, max_size=2))])
        responses.append(draw(st.sampled_from(RESPONSES)).replace("%s", answer))
    return Exam(golds, responses, draw(st.sampled_from([None, None, 0.01])))


def check_grader(tools: Tools, exam: Exam) -> Outcome:
    own = [gold for golds in exam.golds for gold in golds[:1] if boxable(gold)]
    golds = [*exam.golds, *([gold] for gold in own)]
    began = time.monotonic()
    grades = tools.pool.grade(golds, [*exam.responses, *(rf"\boxed{{{gold}}}" for gold in own)], exam.tolerance)
    seconds = time.monotonic() - began
    assert len(grades) == len(golds)
    for grade in grades:
        assert grade.verdict in get_args(Verdict)
        assert grade.extracted is None or isinstance(grade.extracted, str)
    for gold, grade in zip(own, grades[len(exam.golds) :], strict=True):
        assert grade.verdict == "correct", f"the gold {gold!r} itself is {grade.verdict}"
    lost = sum(grade.verdict in ("timeout", "error") for grade in grades)
    assert seconds <= START_SECONDS + lost * (TIMEOUT + START_SECONDS) + len(grades) * TIMEOUT
    return "refused" if lost else "accepted"


def boxable(gold: str) -> bool:
    """It is mathematics, and a box can hold it: braces match, and nothing in it ends the response."""
    if not reads(gold) or len(gold) > 2_000 or re.search(r"<\W?\w|<\||\\$", gold):
        return False
    depth = 0
    for brace in re.findall(r"\\.|[{}]", gold, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0 and extract(rf"\boxed{{{gold}}}") is not None


TEXT_CASES = st.tuples(PAIRS, st.sampled_from(RESPONSES)).map(lambda case: (*case[0], case[1]))
EXAMS = exams()
