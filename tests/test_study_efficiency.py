"""The study of rollouts to accuracy: what it reads off curves, how cells are named, its page, one real run."""

import json
from pathlib import Path

import pytest

from scripts import efficiency_curves as curves
from scripts import efficiency_page as page
from scripts import study_efficiency as study_of
from scripts.efficiency_arms import ABLATIONS, ALGORITHMS, BEYOND, DYNAMICS, SORTED, STEERED, TAKEN_OUT, arms
from scripts.efficiency_runs import Sizes, Study, final, steps_of


def run(values: list[float], **more: object) -> dict[str, object]:
    """A curve with an evaluation every 100 rollouts, 2 updates and 5 seconds."""
    at = range(len(values))
    costs = {"rollouts": [100 * i for i in at], "updates": [2 * i for i in at], "seconds": [5.0 * i for i in at]}
    rest = {"entropy": values, "length": [9.0] * len(at), "careful": values, "took": 36.0, "machine": "a desk"}
    lag = {"ratio/mean": 1.0, "ratio/p95": 1.2, "clip_fraction": 0.1, "ess": 0.9}
    return costs | {"pass@1": values} | rest | {"by_lag": {"0": lag, "1": lag}} | more


LINE = run([0.1, 0.2, 0.3, 0.4, 0.5])


def test_costs_are_interpolated_between_evaluations() -> None:
    assert curves.smooth([0.0, 0.3, 0.3, 0.6]) == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert curves.smooth([0.3]) == [0.3]
    assert curves.smooth([]) == []
    assert curves.cost_to(LINE, 0.25, "rollouts", 400) == pytest.approx(150)
    assert curves.cost_to(LINE, 0.25, "updates", 400) == pytest.approx(3)
    assert curves.cost_to(LINE, 0.25, "seconds", 400) == pytest.approx(7.5)
    assert curves.cost_to(LINE, 0.1, "rollouts", 400) == 0  # where the base is there already
    assert curves.cost_to(LINE, 0.51, "rollouts", 400) is None


def test_what_is_reached_beyond_the_budget_is_not_reached() -> None:
    assert curves.cost_to(LINE, 0.35, "rollouts", 250) == pytest.approx(250)
    assert curves.cost_to(LINE, 0.36, "rollouts", 250) is None
    assert curves.best(LINE, 250) == curves.value_at(LINE, 250) == pytest.approx(0.35)
    assert curves.value_at(LINE, 1000) == pytest.approx(0.5)


def test_runs_that_do_not_reach_a_target_count_as_beyond_all_others() -> None:
    assert curves.middle([300, None, 100]) == 300
    assert curves.middle([300, None, None]) is None
    assert curves.middle([]) is None
    assert page.with_range([300, None, 100]) == "300 [100, not reached]"
    assert page.with_range([300, 200, 100]) == "200 [100, 300]"
    assert page.with_range([None, None]) == "not reached (0 of 2)"
    assert page.with_range([]) == "missing"
    assert curves.cost_to(LINE | {"failed": "why"}, 0.2, "rollouts", 400) is None


def test_ratios_have_an_interval_and_a_bound() -> None:
    assert page.compared([100, 200, 200], [400, 400, 400], 999, (0.6, 0.4)) == ["0.500", "[0.25, 0.50]", "yes", "no"]
    assert page.compared([100], [None], 500, (0.3, 0.1)) == ["< 0.200", "[0.20, 0.20]", "yes", "unknown"]
    assert page.compared([100, None, 100], [200] * 3, 500, (0.6,)) == ["0.500", "[0.50, not reached]", "yes"]
    assert page.compared([None], [100], 500, (0.3, 0.1)) == ["no ratio", "", "no", "no"]


def test_a_step_that_trained_on_nothing_is_a_step_like_others() -> None:
    common = {"phase": "on_policy", "time/step": 2.0, "response/length": 8.0, "response/self_reflection": 0.5}
    trained = {"updates": 4, "entropy": 0.3, **{f"{k}/lag=0": 1.0 for k in ("ratio/mean", "ratio/p95", "ess")}}
    exam = {"eval/pass@1": 0.9, "eval/response_length": 9.0, "eval/self_reflection": 0.75, "time/evaluating": 0.5}
    rows = [
        common | trained | {"clip_fraction/lag=0": 0.0, "rollouts": 10},
        common | {"rollouts": 20} | exam,
    ]
    found = curves.summary(rows, 0.25)
    assert found["pass@1"] == [0.25, 0.9]
    assert found["updates"] == [0, 4]
    assert found["entropy"] == [0.3, 0.3]
    assert found["length"] == [8.0, 9.0]
    assert found["seconds"] == [0, 3.5]


def test_a_collapse_is_the_loss_of_half_of_the_gain() -> None:
    assert curves.collapse(run([0.1, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1])) == 400  # smoothed .1 .37 .5 .37 .23
    assert curves.collapse(LINE) is None


def test_orderings_are_decided_by_students_t() -> None:
    assert page.ordering("", [0.1, 0.2, 0.3])[1] == "undecided"  # .2 ± .058: 3.5 errors, of the 4.3 that three take
    assert page.ordering("", [0.1, 0.12, 0.11])[1] == "yes"
    assert page.ordering("", [-0.1, -0.12, -0.11])[1] == "no"
    assert page.ordering("", [0.1, -0.1, 0.05])[1] == "undecided"
    assert page.ordering("", [0.1])[1] == "missing"


def test_the_mean_over_rollouts_ends_where_it_is_told() -> None:
    assert curves.area(LINE, 400) == pytest.approx(0.3)
    assert curves.area(LINE, 150) == pytest.approx(0.175)


def test_a_cell_is_named_by_all_that_decides_it() -> None:
    study = Study(Path("unused"), 0, Path("unused.json"), Sizes())
    cell = study.cell("a", "grpo", ["optimizer.lr=1e-4", "kl.weight=0"], 0)
    assert final(["a.0.b=1", "c=1", "a=2", "a.1=3"]) == ["a=2", "a.1=3", "c=1"]
    same = study.cell("b", "grpo", ["kl.weight=1", "kl.weight=0", "optimizer.lr=1e-4"], 0)
    assert cell.name == same.name
    others = [
        study.cell("a", "grpo", ["optimizer.lr=1e-4", "kl.weight=0"], 1),
        study.cell("a", "grpo", ["optimizer.lr=2e-4", "kl.weight=0"], 0),
        study.cell("a", "ppo", ["optimizer.lr=1e-4", "kl.weight=0"], 0),
        Study(Path("unused"), 0, Path("unused.json"), Sizes(budget=1)).cell("a", "grpo", cell.keys, 0),
    ]
    assert len({cell.name, *(other.name for other in others)}) == 5


def test_arms_are_tuned_by_the_same_number_of_runs() -> None:
    for algorithm in ALGORITHMS:
        counts = {arm.name: sum(map(len, arm.rounds)) for arm in arms(algorithm)}
        assert set(counts.values()) == {12}, counts


def test_all_settings_are_recipes_that_may_run() -> None:
    from remix.config import load_recipe
    from remix.training.plan import make_plan

    study = Study(Path("u"), 0, Path("u.json"), Sizes())

    def check(recipe: str, keys: tuple[str, ...]) -> None:
        cell = study.cell("", recipe, keys, 0)
        make_plan(load_recipe(cell.path, cell.all_keys))

    for algorithm in ALGORITHMS:
        for arm in arms(algorithm):
            for at in (0, -1):  # a combination of each round's extremes
                check(arm.recipe, (*arm.keys, *(key for options in arm.rounds for key in options[at])))
            for options in arm.rounds:
                for more in options:
                    check(arm.recipe, (*arm.keys, *more))
    for keys in (ABLATIONS | DYNAMICS).values():
        check("remix_grpo", keys)
    for algorithm in ALGORITHMS:
        extremes = [key for options in arms(algorithm)[-1].rounds for key in options[-1]]
        for keys in BEYOND[algorithm].values():
            check(f"remix_{algorithm}", (*extremes, *keys))


def test_steps_generate_the_budget() -> None:
    from remix.config import load_recipe

    def steps(recipe: str, *keys: str) -> int:
        cell = Study(Path("u"), 0, Path("u.json"), Sizes()).cell("", recipe, keys, 0)
        return steps_of(load_recipe(cell.path, cell.all_keys), 8192)

    assert steps("grpo") == 16
    assert steps("remix_grpo") == 21  # 512, 11 x 304 (38 of 64 prompts are fresh), 9 x 512
    assert steps("remix_ppo", "phases.0.until.0.after=2") == 17  # 512, 307, 15 x 512
    assert steps("remix_grpo", *BEYOND["grpo"]["reincarnation at a plateau"]) == 27  # 512, 26 x 304


def test_a_page_of_nothing_and_of_made_up_results(tmp_path: Path) -> None:
    study = Study(tmp_path / "runs", 0, tmp_path / "evidence.json", Sizes(budget=400))

    def written() -> str:
        study_of.write_page(study, tmp_path / "evidence.md")
        return (tmp_path / "evidence.md").read_text("utf-8")

    assert "\nNot run yet: GRPO, 3 to 5 terms; " in written()
    assert not (tmp_path / "evidence.png").exists()
    known = -1
    while known != len(study.results):  # each choice asks for further runs
        known = len(study.results)
        for name, cell in study.wanted.items():
            fast = cell.recipe.startswith("remix")
            values = [0.1, 0.4, 0.7, 0.7, 0.7] if fast else [0.1, 0.2, 0.3, 0.4, 0.5]
            study.results.setdefault(name, run([value + 0.001 * cell.seed % 1 for value in values]))
        text = written()
    assert "| missing" not in text
    assert ", is missing" not in text
    assert "Not run yet" not in text
    for picture in ("evidence.png", "evidence_dynamics.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    row = next(line for line in text.splitlines() if "ReMix / single pass" in line)
    assert "no ratio" not in row
    half = next(line for line in text.splitlines() if line.startswith("| 50%") and "| ReMix |" in line)
    assert "not reached" not in half
    own, option = (
        next(row for row in text.splitlines() if row.startswith(f"| {of} |")) for of in ("ReMix itself", "V-trace")
    )
    assert own.split(" | ")[3] == option.split(" | ")[3] == "130 [129, 131]"
    assert option.split(" | ")[1:3] + option.split(" | ")[4:] == ["undecided", "+0 ± 0 (5)", "1.000", "[0.99, 1.01] |"]
    assert "Tried, and not in recipes" not in text
    tuned = study_of.measure(study, "grpo", study_of.FIRST).chosen["ReMix"] or ()
    name, [gone, *_] = next(iter(study_of.cells_of(study, "grpo", tuned, TAKEN_OUT["grpo"], 1).items()))
    study.results[gone.name] = run([0.1, 0.4, 0.7, 0.7, 0.7])
    text = written()
    assert f"\n| {name} | missing" in text  # of one pair
    assert f"Tried, and not in recipes since they lowered nothing: {name}." in text
    assert gone.name not in study.wanted
    both = {SORTED: BEYOND["grpo"][SORTED], STEERED: TAKEN_OUT["grpo"][STEERED]}
    for cells in study_of.cells_of(study, "grpo", tuned, both, 5).values():
        study.results |= {cell.name: run([0.1, 0.5, 0.8, 0.8, 0.8]) for cell in cells}
    text = written()
    assert f"\n| {SORTED} |  |  | " in text
    assert f"\n| {STEERED} | undecided | +0 ± 0 (5) |" in text  # where ReMix itself is ten points lower
    assert f"the comparison is of {STEERED}, with {SORTED}." in text
    failing = [name for name, cell in study.wanted.items() if cell.what == "remix_grpo, ReMix, 3 to 5 terms"][:2]
    assert len(failing) == 2
    for number, name in enumerate(failing):
        study.results[name] = {"failed": f"loss `{number}` is not finite", "took": 1.0, "machine": "a desk"}
    text = written()
    assert "2 failed" in text
    for number in range(2):
        assert f"loss {number} is not finite" in text
    half = next(line for line in text.splitlines() if line.startswith("| 50%") and "| ReMix |" in line)
    assert half.count("not reached") == 3  # in rollouts, updates and seconds: two of five never got there


def test_a_real_cell_runs_once_and_a_failing_one_is_reported(tmp_path: Path) -> None:
    kept = tmp_path / "evidence.json"
    study = Study(tmp_path / "runs", 1, kept, Sizes(budget=60, eval_rollouts=20, eval_prompts=8))
    small = ("batch.prompts=4", "rollout.engine.batch_size=32", "phases.0.until.0.after=2", "phases.0.utd_ratio=1")
    good = study.cell("good", "remix_grpo", small, 0)
    bad = study.cell("bad", "remix_grpo", (*small, "optimizer.lr=1e18", "faults.skipped_updates=0"), 0)
    study.run([good, bad])
    found = json.loads(kept.read_text("utf-8"))
    assert found[good.name]["rollouts"] == [0, 32, 48, 80]  # 4 x 8, 2 x 8 beside what is replayed, 4 x 8
    assert found[good.name]["updates"] == [0, 2, 4, 6]
    assert len(found[good.name]["length"]) == 4
    assert found[good.name]["took"] > 0
    assert "failed" not in found[good.name]
    assert found[bad.name]["failed"]
    logs = [tmp_path / "runs" / cell.name / "log.txt" for cell in (good, bad)]
    for log in logs:
        log.unlink()
    study.run([good, bad])
    assert not any(log.exists() for log in logs)  # neither is run again, by one study
    again = Study(tmp_path / "runs", 1, kept, study.sizes)
    again.run([good, bad])
    assert [log.exists() for log in logs] == [False, True]


def test_an_error_that_is_no_result_ends_the_study(tmp_path: Path) -> None:
    study = Study(tmp_path / "runs", 1, tmp_path / "evidence.json", Sizes(budget=60, eval_prompts=8))
    with pytest.raises(ValueError, match="nowhere"):
        study.run([study.cell("", "grpo", ["model.path=./nowhere"], 0)])
    assert not study.results
