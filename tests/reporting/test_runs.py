"""What a report reads: whole runs, runs under way, runs that were killed, and what is none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from remix.reporting.runs import Evaluation, Interval, Phase, interval, read_run
from tests.reporting.making import make_run, steps


def test_phases_and_reincarnations(tmp_path: Path) -> None:
    kinds = ["mix_policy"] * 4 + ["on_policy"] * 2
    run = read_run(make_run(tmp_path, steps(6), phases=kinds, result={"reincarnations": [2, 4]}))
    assert run.phases == [
        Phase("mix_policy", 0, 2, 0, 200),
        Phase("mix_policy", 2, 4, 200, 400),
        Phase("on_policy", 4, 6, 400, 600),
    ]
    # Without the result, a change of the phase's name still tells.
    (tmp_path / "result.json").unlink()
    assert [phase.end for phase in read_run(tmp_path).phases] == [4, 6]


def test_the_first_score_is_in_the_checkpoint_before_it_is_in_the_result(tmp_path: Path) -> None:
    make_run(tmp_path, steps(3))
    assert read_run(tmp_path).evaluations == []
    latest = tmp_path / "checkpoints" / "latest"
    latest.mkdir(parents=True)
    state = {"base_evaluation": {"eval/pass@1": 0.25, "eval/problems": 4}, "phase": {"reincarnations": [2]}}
    (latest / "state.json").write_text(json.dumps({"state": state}))
    run = read_run(tmp_path)
    assert run.evaluations == [Evaluation(0, 0.0, {"eval/pass@1": 0.25, "eval/problems": 4.0})]
    assert run.reincarnations == [2]


def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = make_run(tmp_path, steps(3)) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run = read_run(tmp_path)
    assert (run.steps, run.rollouts, run.result, run.planned) == (2, 200, None, 20)


def test_numbers_that_are_none_are_kept_apart(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, steps(3, entropy=[0.5, math.nan, math.inf], unknown__key=1.0, phase_note=2.0)))
    assert [value for _, value in run.series("entropy")] == [0.5]
    assert run.not_finite == {"entropy": 2}
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "rollouts": 1' + "0" * 400 + ', "x": "text", "y": true}\n')
    run = read_run(tmp_path)
    assert (run.rollouts, dict(run.rows[0].metrics)) == (0.0, {"step": 0.0, "rollouts": None})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda path: path.rename(path.with_name("elsewhere")), "no such directory"),
        (lambda path: (path / "metrics.jsonl").unlink(), "not the directory of a run"),
        (lambda path: (path / "metrics.jsonl").write_text('{"step": 0'), "no training step has been logged yet"),
        (lambda path: (path / "metrics.jsonl").write_text('{"step": 0}\n-\n'), "metrics.jsonl:2.*remove the line"),
        (lambda path: (path / "completions.jsonl").write_text("[]\n"), "completions.jsonl:1.*remove the line"),
        (lambda path: (path / "continual.json").write_text("{}"), r"several tasks.*stages/task=00"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_one_clear_error(tmp_path: Path, broken: object, said: str) -> None:
    path = make_run(tmp_path / "run", steps(2))
    broken(path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=said):
        read_run(path)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "{", "a: &a [*a]", "steps: many\nphases: 3\nmodel: [x]\nobjective: 1\n"]
)
def test_a_recipe_that_says_nothing_is_no_error(tmp_path: Path, text: str) -> None:
    make_run(tmp_path, steps(2))
    (tmp_path / "recipe.yaml").write_text(text)
    run = read_run(tmp_path)
    assert (run.planned, run.recipe_text) == (None, text)


def test_intervals_by_hand() -> None:
    def at(**metrics: float) -> Evaluation:
        return Evaluation(1, 1.0, {f"eval/{name.replace('__', '/')}": value for name, value in metrics.items()})

    # Wilson 1927, 95%, 50 of 100: the table has 0.4038 to 0.5962.
    assert interval(at(**{"pass@1": 0.5, "problems": 100})) == pytest.approx(Interval(0.4038, 0.5962), abs=1e-4)
    assert interval(at(**{"pass@1": 0.0, "problems": 10})) == pytest.approx(Interval(0.0, 0.2775), abs=1e-4)
    assert interval(at(**{"pass@1": 0.5})) is None
    two = {"pass@1": 0.4, "a__pass@1": 0.5, "a__problems": 100, "b__pass@1": 0.3, "b__problems": 50}
    half = 1.96 * math.sqrt(0.25 / 100 + 0.21 / 50) / 2
    assert interval(at(**two)) == pytest.approx(Interval(0.4 - half, 0.4 + half))
    assert interval(at(**two), "a") == pytest.approx(Interval(0.4038, 0.5962), abs=1e-4)
    assert interval(at(**{key: value for key, value in two.items() if key != "b__problems"})) is None
