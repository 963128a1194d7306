"""The grader on every kind of answer, right ones and near misses, and on every way of stating one."""

from __future__ import annotations

import pytest

from remix.rewards.answers.extract import extract
from remix.rewards.equivalence import grade
from tests.rewards.grader_cases import CASES

ROWS = [(kind, *case) for kind, cases in CASES.items() for case in cases]
FILLER = "Let us see. We simplify $x^2 = 49$, hence 7 of them.\n\n"


@pytest.mark.parametrize(("kind", "gold", "answer", "same"), ROWS)
def test_boxed_answer_against_gold(kind: str, gold: str, answer: str, same: bool) -> None:
    assert (grade([gold], rf"{FILLER}Thus \(\boxed{{{answer}}}\).").verdict == "correct") is same, kind


@pytest.mark.parametrize("gold", sorted({gold for _, gold, _, _ in ROWS}))
def test_every_gold_equals_itself(gold: str) -> None:
    assert grade([gold], rf"\boxed{{{gold}}}").verdict == "correct"
    assert grade([gold], rf"$\boxed{{ {gold} }}$").verdict == "correct"


@pytest.mark.parametrize(
    ("gold", "answer", "tolerance", "same"),
    [
        ("3.14", "3.141", None, False),
        ("3.14", "3.141", 0.01, True),
        ("3.14", "3.2", 0.01, False),
        ("4.5e33", r"4.49 \times 10^{33}", 0.01, True),
        ("4.5e33", r"4.4 \times 10^{33}", 0.01, False),
        ("4.5e33", r"4.5 \times 10^{32}", 0.01, False),
        ("6630", r"6633 \text{ m}", 0.01, True),
        ("-10", "10", 0.01, False),
        ("0", "0.001", 0.01, False),
        ("1.73", r"\sqrt{3}", 0.01, True),
        ("2x", "2.01x", 0.01, False),  # a tolerance is for numbers
        ("(1,2)", "(1.001,2)", 0.01, True),
    ],
)
def test_tolerance_is_an_option(gold: str, answer: str, tolerance: float | None, same: bool) -> None:
    assert (grade([gold], rf"\boxed{{{answer}}}", tolerance).verdict == "correct") is same


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1}, no: \boxed{ 2 }", "2"),
        (r"first attempt \boxed{41}, final \boxed{42}", "42"),
        (r"\boxed{41} Wait. \boxed{42}", "42"),
        ("\\boxed{41}\n\n\\boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces do not count
        (r"\boxed {7} or \fbox{8}", "7, 8"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"x = \boxed{1}, y = \boxed{2}", "1, 2"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{4} then \boxed{12", "4"),  # the last was cut off
        (r"} {{ \boxed{6}", "6"),  # stray braces outside
        (r"\boxed{5}, that is \boxed{}", "5"),
        (r"\\boxed{5}", "5"),
        (r"\boxed 5$", "5"),
        (r"\boxed{}", None),
        (r"\boxed{12", None),
        ("", None),
        (" \n ", None),
        ("I do not know.", None),
        (r"<think>\boxed{5}</think> so \boxed{6}", "6"),
        (r"<think>\boxed{5}</think> I give up.", None),
        (r"<think>it is \boxed{5}", None),
        (r"\boxed{5} <think> or maybe not", None),
        (r"<think>a</think>", None),
        (r"</think>\boxed{5}", "5"),
        ("<think>a</think><answer>42</answer>", "42"),
        (r"<answer>The answer is \boxed{42}.</answer>", "42"),
        (r"\boxed{41} <answer> 42 </answer>", "42"),
        (r"<answer>41</answer> no, \boxed{42}", "42"),
        ("<answer></answer>", None),
        ("The answer is 5.", "5"),
        ("The answer is: **42**", "42"),
        ("**Final Answer**\n\n42", "42"),
        ("Final Answer: The final answer is $12$. I hope it is correct.", "12"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        ("The answer is 42 because 6 times 7 is 42.", "42"),
        ("Answer: 41 was a wrong guess.\nAnswer: 42", "42"),
        (r"The answer is \(\frac{1}{2}\), as 2 shows.", r"\frac{1}{2}"),
        ("The answer is $1$ and $2$.", "1, 2"),
        ("The answer is Evelyn.", "Evelyn"),
        ("The answer is -3.5", "-3.5"),
        ("The answer is not 5, but 6.", "6"),
        ("The answer is 7. The answer is not 5.", "7"),
        ("The answer is 5. No: the answer is not 5.", None),
        ("He has 3 * 4 = 12 apples.\n#### 12", "12"),
        ("#### 1,234\n", "1,234"),
        ("#### Step 1\nThe answer is 8", "8"),
        ("There are $3 + 4$ or 7 of them.", "7"),
        ("so we get $x = 5$.", "x = 5"),
        ("\\[\n9\n\\]", "9"),
        ("10/9", "10/9"),
        ("It costs 28 %.", "28 %"),
        (r"\boxed{5}<|im_end|>\boxed{6}", "5"),
    ],
)
def test_what_counts_as_the_answer(response: str, answer: str | None) -> None:
    found = extract(response)
    assert found is None if answer is None else " ".join(str(found).split()).replace(", or", ",") == answer


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("5", "The answer is not 5"),
        ("5", "The answer is not $5$."),
        ("5", "The answer isn't 5."),
        ("5", "The answer cannot be 5."),
        ("5", "It is not 5."),
        ("5", r"\boxed{\text{not } 5}"),
        ("5", r"\boxed{\neq 5}"),
        ("5", "The answer is 5 or 6."),
        ("5", r"\boxed{5} or \boxed{6}"),
        ("5", r"\boxed{4, 5, 6}"),
        ("5", r"<think>The answer is \boxed{5}</think> The answer is \boxed{6}"),
        ("2", "AZYUK2A"),
        ("5", r"\boxed{5" + "0" * 3000 + "}"),
    ],
)
def test_what_must_never_pass(gold: str, response: str) -> None:
    assert grade([gold], response).verdict in ("wrong", "no_answer")


def test_any_of_several_golds_and_golds_in_boxes() -> None:
    assert grade(["1", r"\frac{1}{2}"], r"\boxed{0.5}").verdict == "correct"
    assert grade([r"so \boxed{7}"], r"\boxed{7.0}").verdict == "correct"
    assert grade(["3 * 4 = 12\n#### 12"], "The answer is 12").verdict == "correct"
