"""Which runs are one line, and the rollouts that a line takes to a target, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from remix.reporting.lines import Point, Reached, accuracy, band, group, rollouts_to, targets, thinned
from remix.reporting.runs import Run, read_run
from tests.reporting.making import make_run, steps


def run_of(
    folder: Path, scores: dict[int, float], *, base: float | None = 0.2, count: int = 10, **recipe: object
) -> Run:
    """With pass@1 after the steps that `scores` names; 100 rollouts a step."""
    rows = steps(count, reward__mean=0.5)
    for step, score in scores.items():
        rows[step - 1]["eval/pass@1"] = score
    result = {"base_pass_at_1": base, "reincarnations": []}
    return read_run(make_run(folder, rows, recipe=recipe, result=result))


def test_runs_that_differ_in_the_seed_alone_are_one_line(tmp_path: Path) -> None:
    changes: list[dict[str, object]] = [
        {"seed": 1, "run_dir": "x"},
        {"seed": 1, "advantage": {"type": "gae"}},
        {"seed": 2, "run_dir": "y", "max_steps": 5, "log": {"trackers": []}},
        {"seed": 3, "phases": [{"type": "mix_policy", "window": 2}, {"type": "on_policy"}]},
        {"seed": 3, "phases": [{"type": "mix_policy", "window": 3}, {"type": "on_policy"}]},
    ]
    runs = [run_of(tmp_path / str(number), {}, **change) for number, change in enumerate(changes)]
    lines = group(runs)
    assert [[run.name for run in line.runs] for line in lines] == [["0", "2"], ["1"], ["3"], ["4"]]
    assert [line.label for line in lines] == ["GRPO", "PPO", "ReMix-GRPO, window 2", "ReMix-GRPO, window 3"]


def test_runs_without_a_recipe_are_lines_of_their_own(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, {}) for name in ("a", "b")]
    for name in ("a", "b"):
        (tmp_path / name / "recipe.yaml").write_text("{broken: [", encoding="utf-8")
    runs = [read_run(run.path) for run in runs]
    assert [line.label for line in group(runs)] == ["a", "b"]


def test_rollouts_to_a_target_on_straight_lines() -> None:
    curve = [Point(0, 0, 0.2), Point(5, 500, 0.4), Point(10, 1000, 0.3), Point(15, 1500, 0.7)]
    assert rollouts_to(curve, 0.2) == 0
    assert rollouts_to(curve, 0.3) == pytest.approx(250)  # half way from 0.2 to 0.4
    assert rollouts_to(curve, 0.4) == pytest.approx(500)
    assert rollouts_to(curve, 0.5) == pytest.approx(1250)  # from 0.3 to 0.7
    assert rollouts_to(curve, 0.71) is None
    assert rollouts_to(curve[1:], 0.3) == 500, "nothing is known from before the first evaluation"
    assert rollouts_to([], 0.3) is None


def test_targets_are_shares_of_the_first_lines_gain(tmp_path: Path) -> None:
    slow = [run_of(tmp_path / f"s{seed}", {5: 0.4, 10: 0.6}, seed=seed) for seed in (1, 2)]
    fast = [
        run_of(tmp_path / "f1", {5: 0.7, 10: 0.8}, seed=1, steps=30),
        run_of(tmp_path / "f2", {5: 0.45, 10: 0.45}, seed=2, steps=30),
    ]
    found = targets(group([*slow, *fast]))
    assert found is not None
    assert (found.base, found.best) == pytest.approx((0.2, 0.6))
    assert found.levels == pytest.approx([0.4, 0.5, 0.56, 0.6])
    first, second = found.reached
    assert [one.median for one in first] == pytest.approx([500, 750, 900, 1000])
    # 0.4 is reached by the one after 0.2/0.5 of 500 rollouts, by the other after 0.2/0.25; 0.5 by one of two alone.
    assert second[0].rollouts == pytest.approx([200, 400])
    assert second[0].median == pytest.approx(300)
    assert (second[1].rollouts, second[1].of, second[1].median) == (pytest.approx([300]), 2, None)


def test_a_median_counts_those_that_never_came() -> None:
    assert Reached([10.0, 20.0], of=3).median == 20
    assert Reached([10.0], of=3).median is None
    assert Reached([], of=1).median is None


def test_without_a_gain_there_are_no_targets(tmp_path: Path) -> None:
    worse = run_of(tmp_path / "worse", {5: 0.1})
    unknown = run_of(tmp_path / "unknown", {5: 0.6}, base=None)
    unscored = run_of(tmp_path / "unscored", {})
    assert [targets(group([run])) for run in (worse, unknown, unscored)] == [None, None, None]


def test_a_band_goes_as_far_as_all_of_its_runs(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path / "a", {2: 0.3, 4: 0.5}, seed=1, count=4),
        run_of(tmp_path / "b", {2: 0.4, 4: 0.6, 6: 0.9}, seed=2, base=0.3),
    ]
    (line,) = group(runs)
    assert band(line, accuracy) == [
        Point(0, 0, 0.25, 0.2, 0.3),
        Point(2, 200, pytest.approx(0.35), 0.3, 0.4),  # type: ignore[arg-type]
        Point(4, 400, pytest.approx(0.55), 0.5, 0.6),  # type: ignore[arg-type]
    ]


def test_a_long_curve_is_thinned_to_means() -> None:
    curve = [Point(step, 10.0 * step, float(step % 2), 0.0, float(step)) for step in range(1, 1001)]
    short = thinned(curve, most=100)
    assert len(short) == 100
    assert short[0] == Point(10, 100.0, 0.5, 0.0, 10.0)
    assert short[-1].steps == 1000
    assert thinned(curve[:50], most=100) == curve[:50]
