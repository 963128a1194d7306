"""What is decided without mathematics, and how cheaply. No case here needs a deadline."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from remix.rewards.answers.extract import extract
from remix.rewards.equivalence import Grade, gold_answer, grade, quick_grade


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("5", "5", "correct"),
        ("1234", "1,234", "correct"),
        ("0.50", ".5", "correct"),
        ("1e3", "1000", "correct"),
        (r"\frac{1}{2}", "1/2", "correct"),
        ("(1, 2)", r"(1,\! 2)", "correct"),
        ("$x$", "x.", "correct"),
        ("5", "6", "wrong"),
        ("5", "", "no_answer"),
        ("5", None, "no_answer"),
        ("5", "x" * 3000, "wrong"),  # too long to be parsed
        ("y" * 3000, "y" * 3000, "correct"),  # though not to be compared as text
        ("0.333", "0.3333", None),
        ("12", "1 2", None),
        ("32349", "32, 349", None),
        ("1, 2", "2, 1", None),
    ],
)
def test_quick_grade(gold, answer, verdict):
    found = quick_grade([gold], answer)
    assert (found and found.verdict) == verdict


def test_any_of_several_golds():
    assert quick_grade(["1", "2"], "2") == Grade("correct", "2")
    assert quick_grade(["1", "2"], "3") == Grade("wrong", "3")
    assert quick_grade(["1", "x"], "3") is None  # x might be 3 for all that text can tell


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{",
        r"\boxed{1}",
        "{",
        "}",
        "\\",
        r"\boxed{1} and ",
        "a" * 10,
        "<think>",
        "<answer>1",
        "#### 1\n",
        "the answer is ",
        "answer to a ",
        "final answer ",
        "$",
        "\\(",
        "$$",
        " ",
        "\n",
        "1,",
        "\\boxed ",
        "<|im_end|>",
    ],
)
def test_endless_repetition_is_read_in_linear_time(piece):
    text = piece * (1_000_000 // len(piece))
    began = time.perf_counter()
    quick_grade(["5"], extract(text))
    gold_answer(text)
    assert time.perf_counter() - began < 10  # measured: under 2 s


def test_what_a_worker_imports_is_light():
    code = (
        "import remix.rewards.math_worker, sys;"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'sympy', 'mpmath') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"(-\infty,-7)\cup(1,2)", "(10, B)", "wrong"),  # the end of an interval without a value
        (r"10 \le x < 10", r"10 \le x < i^i", "wrong"),  # a bound that is computed as a complex number
        (r"x < 2", r"x < \frac{1}{0}", "wrong"),
        ("10", r"٠.1101 \text{ (base 2)}", "wrong"),  # digits of another script
        ("4", "2²", "correct"),  # a superscript is a digit to Python, but no decimal one
        (r"\frac{3}{4}", "٣/٤", "correct"),
        ("10**", r"\,10**\,", "correct"),  # thin spaces at either end
        ("10 000", r"\,10 000\,", "correct"),
    ],
)
def test_odd_answers_are_graded_and_no_error(gold, answer, verdict):
    assert grade([gold], rf"\boxed{{{answer}}}").verdict == verdict


BOMBS = {
    "tower": r"9^{9^{9^{9}}} - 1",
    "long tower": "^".join(["2"] * 900),
    "factorial": r"(10^{10^{10}})!",
    "binomial": r"\binom{10^9}{5\cdot 10^8}",
    "exponentials": r"e^{e^{e^{e^{e}}}}",
    "parentheses": "(" * 900 + "1" + ")" * 900,
    "roots": r"\sqrt{" * 300 + "2" + "}" * 300,
    "fractions": r"\frac{1}{" * 300 + "2" + "}" * 300,
    "digits": "9" * 1900,
    "many digits": "9" * 100_000,
    "exponent": "1e999999",
    "factorials": "x!" * 400,
    "list": "1," * 900,
    "signs": r"\pm 1" * 150,
    "bars": "|" * 1000,
    "texts": r"\text{" * 400,
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("gold", [r"\frac{1}{2}", "x + 1", r"\{1, 2\}"])
def test_what_is_too_large_or_too_deep_is_wrong_at_once(name, gold):
    began = time.perf_counter()
    assert grade([gold], rf"\boxed{{{BOMBS[name]}}}").verdict in ("wrong", "no_answer")
    assert grade([BOMBS[name] + " "], rf"\boxed{{{gold}}}").verdict == "wrong"
    assert time.perf_counter() - began < 5  # measured: under 0.1 s
