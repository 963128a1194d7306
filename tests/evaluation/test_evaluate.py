"""Scores of an exam by hand, and what training makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from remix.evaluation.evaluate import Evaluation, evaluate, pass_at_ks, problem_rows, training_metrics
from remix.evaluation.exam import Exam, Response
from remix.types import Prompt, Sampling, Verdict


def exam(problems: int, samples: int, name: str = "sums") -> Exam:
    prompts = tuple(Prompt(f"sums/{i}", "?", "!", "sums", token_ids=(1,)) for i in range(problems))
    return Exam(name, prompts, (("!",),) * problems, samples, Sampling(8), lambda *_: [], ("wait",))


def responses(*members: tuple[Verdict, int, bool, str | None], samples: int) -> list[Response]:
    return [
        Response(
            f"sums/{i // samples}", i % samples, 0, "Wait." if truncated else "", tokens, truncated, verdict, answer
        )
        for i, (verdict, tokens, truncated, answer) in enumerate(members)
    ]


FOUR = responses(
    ("correct", 1, False, "3"),
    ("wrong", 2, True, "4"),
    ("correct", 3, False, "3"),
    ("correct", 4, False, "3.0"),
    ("timeout", 5, False, None),
    ("error", 6, False, None),
    ("no_answer", 7, True, None),
    ("wrong", 8, False, "5"),
    samples=2,
)


def test_by_hand() -> None:
    evaluation = evaluate(exam(4, 2), FOUR)
    assert evaluation.per_problem == (0.5, 1.0, 0.0, 0.0)
    assert evaluation.avg_at_k == (0.5 + 1 + 0 + 0) / 4
    assert evaluation.pass_at == {2: 0.5}  # two of four problems have a correct response
    assert evaluation.maj_at_k == 0.5  # the first of the tie of problem 0 is the correct one
    assert evaluation.mean_tokens == 4.5
    assert evaluation.self_reflection == 0.25
    assert evaluation.metrics("eval/sums") == {
        "eval/sums/pass@1": 0.375,
        "eval/sums/problems": 4,
        "eval/sums/pass@2": 0.5,
        "eval/sums/maj@2": 0.5,
        "eval/sums/response_length": 4.5,
        "eval/sums/truncated": 0.25,
        "eval/sums/no_answer": 1 / 8,
        "eval/sums/grader_failed": 2 / 8,
        "eval/sums/self_reflection": 0.25,
    }


def test_the_line_of_a_problem() -> None:
    assert problem_rows(exam(4, 2), FOUR)[0] == {
        "benchmark": "sums",
        "problem": "sums/0",
        "golds": ["!"],
        "samples": 2,
        "correct": 1,
        "avg@k": 0.5,
        "maj@k": 1.0,
        "verdicts": ["correct", "wrong"],
        "answers": ["3", "4"],
        "tokens": [1, 2],
        "truncated": [False, True],
    }


def test_a_single_sample_has_no_majority() -> None:
    evaluation = evaluate(exam(2, 1), [FOUR[0], replace(FOUR[1], problem="sums/1", sample=0)])
    assert (evaluation.avg_at_k, evaluation.pass_at, evaluation.maj_at_k) == (0.5, {}, None)
    assert set(evaluation.metrics("eval")) == {
        f"eval/{name}"
        for name in (
            "pass@1",
            "problems",
            "response_length",
            "truncated",
            "no_answer",
            "grader_failed",
            "self_reflection",
        )
    }


def test_which_ks() -> None:
    assert [pass_at_ks(samples) for samples in (1, 2, 6, 16)] == [[], [2], [2, 4, 6], [2, 4, 8, 16]]
    assert set(evaluate(exam(1, 8), responses(*[("wrong", 1, False, "1")] * 8, samples=8), [1, 3]).pass_at) == {3}


def test_training_averages_over_benchmarks_and_leaves_its_own_problems_nameless() -> None:
    one: Evaluation = evaluate(exam(4, 2), FOUR)
    assert training_metrics([replace(one, name="")])["eval/pass@1"] == 0.375
    both = training_metrics([one, replace(one, name="more", avg_at_k=1.0)])
    assert (both["eval/sums/pass@1"], both["eval/more/pass@1"]) == (0.375, 1.0)
    assert both["eval/pass@1"] == pytest.approx((0.375 + 1) / 2)
    alone = training_metrics([one])
    assert alone["eval/pass@1"] == alone["eval/sums/pass@1"] == 0.375
