"""`remix eval`, and a run's own benchmarks, on pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remix import cli
from remix.evaluation.benchmarks import Benchmark, load_benchmarks, load_problems
from tests.tiny import make_picture_task, make_tiny_vision_model, opened, tiny_recipe
from tests.training.test_degenerate import metrics_of


def remix_eval(model: Path, out: Path, *options: str) -> int:
    words = ["eval", "--model", str(model), "--benchmarks", "shapes", "--engine", "hf", "--out", str(out)]
    return cli.main([*words, "--limit", "12", "--max-tokens", "4", *options])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer's letters are those of the questions."""
    return make_tiny_vision_model(tmp_path_factory.mktemp("seeing"))


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def test_a_vision_language_model_is_evaluated_on_pictures(model: Path, tmp_path: Path) -> None:
    assert remix_eval(model, tmp_path / "one") == 0
    assert remix_eval(model, tmp_path / "two", "--batch-size", "5") == 0
    one, two = (summary(tmp_path / name) for name in ("one", "two"))
    assert one["run"] == two["run"]
    assert "processor" in one["run"]["model"]
    answers = [(tmp_path / name / "problems.jsonl").read_text() for name in ("one", "two")]
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 12


def test_a_text_model_is_not(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert remix_eval(tiny_model, tmp_path / "out") == 2
    assert "a text model, and the task has images: choose a vision-language model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_evaluated_on_pictures_too(model: Path, tmp_path: Path) -> None:
    changes = {
        "steps": 1, "tasks": [make_picture_task(tmp_path / "task")], "prompt": {"max_tokens": 24},
        "eval": {"benchmarks": ["shapes"], "limit": 6, "max_tokens": 4},
    }  # fmt: skip
    with opened(tiny_recipe(model, tmp_path / "run", changes)) as t:
        t.fit()
    assert "eval/shapes/pass@1" in metrics_of(tmp_path / "run")[-1]


def test_shapes_are_as_many_of_each_kind() -> None:
    (benchmark,) = load_benchmarks(["shapes"])
    problems = load_problems(benchmark)
    kinds = [prompt.id.split("/")[1] for prompt in problems.prompts]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("colour", "shape", "where", "bigger", "count", "digit"), 64
    )
    assert all(prompt.images[0].startswith("shapes:") for prompt in problems.prompts)


def test_a_local_benchmark_names_its_pictures(tmp_path: Path) -> None:
    make_picture_task(tmp_path)
    plain = {
        "name": "squares", "title": "Squares", "source": "here", "licence": "none", "count": 24, "file": "rows.jsonl",
        "fields": {"images": "shown"}, "template": "{problem}", "grader": {"type": "exact_match"},
        "temperature": 0.0, "max_tokens": 4,
    }  # fmt: skip
    problems = load_problems(Benchmark.model_validate(plain), tmp_path)
    assert problems.prompts[0].images == (str(tmp_path / "pictures" / "0.png"),)
    assert {len(prompt.images) for prompt in problems.prompts} == {0, 1, 2}
    make_picture_task(tmp_path / "copy")
    assert load_problems(Benchmark.model_validate(plain), tmp_path / "copy").sha256 == problems.sha256
