"""What counts as the answer, and what is decided without mathematics. No case here needs a deadline."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from remix.rewards.equivalence import Grade, boxed_answer, grade, quick_grade, relevant


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1}, no: \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces do not count
        (r"\boxed {7} or \fbox{8}", "7, 8"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{4} then \boxed{12", "4"),  # the last was cut off
        (r"} {{ \boxed{6}", "6"),  # stray braces outside
        (r"\boxed{}", ""),
        (r"\boxed{12", None),
        ("the answer is 5", None),
    ],
)
def test_boxed_answer(response, answer):
    assert boxed_answer(response) == answer


@pytest.mark.parametrize(
    ("gold", "response", "verdict"),
    [
        ("5", r"\boxed{5}", "correct"),
        ("1234", r"\boxed{1,234}", "correct"),
        ("0.50", r"\boxed{.5}", "correct"),
        ("(1, 2)", r"\boxed{(1,\! 2)}", "correct"),
        ("$x$", r"\boxed{x.}", "correct"),
        ("5", r"\boxed{6}", "wrong"),
        ("5", r"\boxed{}", "no_answer"),
        ("5", "  \n", "no_answer"),
        ("5", r"\boxed{" + "x" * 3000 + "}", "wrong"),  # too long to be parsed
        ("y" * 3000, r"\boxed{" + "y" * 3000 + "}", "correct"),  # though not to be compared as text
        ("0.333", r"\boxed{0.3333}", None),
        (r"\frac12", r"\boxed{0.5}", None),
        ("5", "it is 5", None),
        ("1, 2", r"\boxed{2} and \boxed{1}", None),
    ],
)
def test_quick_grade(gold, response, verdict):
    found = quick_grade([gold], response)
    assert (found and found.verdict) == verdict


def test_any_of_several_golds():
    assert quick_grade(["1", "2"], r"\boxed{2}") == Grade("correct", "2")
    assert quick_grade(["1", "2"], r"\boxed{3}") == Grade("wrong", "3")
    assert quick_grade(["1", "x"], r"\boxed{3}") is None  # x might be 3 for all that text can tell
    assert grade(["1", r"\frac{1}{2}"], r"\boxed{0.5}") == Grade("correct", "0.5")


@pytest.mark.parametrize(
    ("gold", "response", "verdict"),
    [
        (r"\frac{1}{2}", r"hence \boxed{\dfrac{2}{4}}", "correct"),
        (r"(x+1)^2", r"\boxed{x^2+2x+1}", "correct"),
        (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", "correct"),
        ("1, 2", r"\boxed{2} and \boxed{1}", "correct"),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", "wrong"),
        ("34", "... so the answer is 34.", "correct"),
        ("34", "... so the answer is 35.", "wrong"),
        ("34", "I do not know.", "no_answer"),
    ],
)
def test_grade(gold, response, verdict):
    assert grade([gold], response).verdict == verdict
    assert grade([gold], relevant(response)) == grade([gold], response)


@pytest.mark.parametrize("piece", [r"\boxed{", r"\boxed{1}", "{", "}", "\\", r"\boxed{1} and ", "a" * 10])
def test_endless_repetition_is_read_in_linear_time(piece):
    began = time.perf_counter()
    quick_grade(["5"], piece * 100_000)
    relevant(piece * 100_000)
    assert time.perf_counter() - began < 5  # measured: under 0.5 s


def test_what_a_worker_imports_is_light():
    code = (
        "import remix.rewards.math_worker, sys; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
