"""Each warning fires on a curve that deserves it, and not on its healthy neighbour."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from remix.config import load_recipe
from remix.reporting import findings as rules
from remix.reporting.findings import findings
from remix.reporting.lines import flat
from remix.reporting.runs import read_run
from tests.reporting.making import make_run, steps
from tests.tiny import ROOT

N = 20
EVALUATED = {"eval/pass@1": 0.5, "eval/problems": 100}


def ramp(first: float, last: float) -> list[float]:
    """N values on a straight line."""
    return [first + (last - first) * step / (N - 1) for step in range(N)]


def titles(folder: Path, *, base: float = 0.2, score: float = 0.5, **series: Any) -> list[str]:
    """Of a run of N steps with an evaluation at its end, healthy but for `series`."""
    rows = steps(N, **({"reward__mean": ramp(0.2, 0.6)} | series))
    rows[-1] |= {"eval/pass@1": score, "eval/problems": 100}
    return [found.title for found in findings(read_run(make_run(folder, rows, result={"base_pass_at_1": base})))]


DYING = [0.5 * 0.8**step for step in range(N)]

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Updates were skipped", {"updates__skipped": [0.0] * 19 + [1.0], "updates": 8.0}, {"updates__skipped": 0.0}),
    # Up to 0.8 at step 11, then down to 0.6: a third of the gain.
    ("The reward falls after a peak", {"reward__mean": ramp(0.2, 1.3)[:11] + [0.8 - 0.022 * i for i in range(9)]}, {}),
    ("The reward falls after a peak", {"reward__mean": ramp(0.8, 0.2)}, {"reward__mean": [0.4, 0.6] * 10}),
    ("Few samples do the work", {"ess": ramp(0.98, 0.3)}, {"ess": ramp(0.9, 0.8)}),
    ("Fewer samples do the work", {"ess": ramp(0.98, 0.6)}, {"ess": ramp(0.6, 0.98)}),
    ("Old samples hardly count", {"ess": 0.9, "ess__lag=2": ramp(0.9, 0.0)}, {"ess": 0.9, "ess__lag=2": 0.5}),
    ("Many gradients are clipped", {"clip_fraction": ramp(0.05, 0.5)}, {"clip_fraction": ramp(0.05, 0.25)}),
    ("The entropy is gone", {"entropy": DYING}, {"entropy": ramp(0.5, 0.1)}),
    ("The entropy is gone", {"entropy": DYING}, {"entropy": DYING, "verdict__correct": 0.99}),
    ("The entropy grows", {"entropy": ramp(0.5, 2.0)}, {"entropy": ramp(0.5, 0.8)}),
    ("Responses shrank", {"response__length": ramp(100, 40)}, {"response__length": ramp(100, 80)}),
    (
        "Responses shrank and grew again",
        {"response__length": ramp(100, 20)[:10] + ramp(20, 100)[10:]},
        {"response__length": ramp(40, 100)},
    ),
    ("Sampler and trainer disagree", {"sampler__mismatch_kl": 0.02}, {"sampler__mismatch_kl": 0.002}),
    ("Sampler and trainer disagree more and more", {"sampler__mismatch_kl": ramp(1e-5, 0.005)}, {}),
    ("Responses are cut off", {"response__truncated": ramp(0.0, 0.4)}, {"response__truncated": 0.05}),
    ("Responses could not be graded", {"verdict__error": 0.01, "verdict__timeout": 0.01}, {"verdict__error": 0.001}),
    ("Many responses have no answer", {"verdict__no_answer": 0.5}, {"verdict__no_answer": ramp(0.6, 0.0)}),
    ("Most groups teach nothing", {"rollouts__uniform_groups": 0.9}, {"rollouts__uniform_groups": 0.4}),
    ("Rollouts were left out", {"batch__left_out": 5.0, "batch__rollouts": 100.0}, {"batch__left_out": 0.0}),
    ("The policy is far from its reference", {"kl__reference": ramp(0.0, 2.0)}, {"kl__reference": 0.1}),
    ("The gradient spikes", {"grad_norm__policy": [1.0] * 19 + [50.0]}, {"grad_norm__policy": [1.0] * 19 + [9.0]}),
    ("Values that are not finite", {"entropy": [0.5] * 19 + [float("nan")]}, {"entropy": 0.5}),
    ("Nothing was gained", {"score": 0.2}, {"score": 0.21}),
]


@pytest.mark.parametrize(("title", "ill", "well"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)])
def test_a_warning_fires_and_does_not(tmp_path: Path, title: str, ill: dict[str, Any], well: dict[str, Any]) -> None:
    assert titles(tmp_path / "ill", **ill) == [title]
    assert titles(tmp_path / "well", **well) == []


def test_a_short_run_has_no_trends(tmp_path: Path) -> None:
    rows = steps(rules.FEWEST_STEPS - 1, ess=0.01, entropy=0.1, clip_fraction=0.9)
    assert findings(read_run(make_run(tmp_path, rows))) == []


def test_a_fall_of_pass_at_1_is_one_that_its_intervals_do_not_explain(tmp_path: Path) -> None:
    def said(last: float, problems: int | None) -> list[str]:
        rows = steps(N)
        for step, score in ((9, 0.6), (19, last)):
            rows[step] |= {"eval/pass@1": score} | ({} if problems is None else {"eval/problems": problems})
        return [found.title for found in findings(read_run(make_run(tmp_path / f"{last}-{problems}", rows)))]

    fell = ["pass@1 falls after a peak"]
    assert said(0.52, 1000) == fell  # 0.08 lost; each ±0.03
    assert said(0.52, 50) == []  # each ±0.13
    assert (said(0.52, None), said(0.56, None)) == (fell, [])  # more than 0.05, where nothing is known


def test_a_run_that_was_never_evaluated_says_so(tmp_path: Path) -> None:
    rows = steps(N, entropy=0.5)
    (found,) = findings(read_run(make_run(tmp_path / "never", rows)))
    assert (found.weight, found.title) == ("look", "Nothing was evaluated")
    early = make_run(tmp_path / "early", rows, recipe={"eval": {"every": N + 1}})
    assert findings(read_run(early)) == [], "the first evaluation is yet to come"
    (early / "result.json").write_text("{}", encoding="utf-8")
    assert [found.title for found in findings(read_run(early))] == ["Nothing was evaluated"]


@pytest.mark.parametrize("change", [{"rollout": {"group_size": 1}}, {"advantage": {"type": "gae"}}])
def test_equal_rewards_matter_where_they_are_compared_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    rows = steps(N, rollouts__uniform_groups=1.0)
    rows[-1] |= EVALUATED
    assert findings(read_run(make_run(tmp_path, rows, recipe=change))) == []


def test_serious_findings_come_first(tmp_path: Path) -> None:
    weights = [
        found.weight for found in findings(read_run(make_run(tmp_path, steps(N, verdict__no_answer=0.9, ess=0.1))))
    ]
    assert weights == ["serious", "look", "look"]


def test_every_key_that_a_remedy_names_is_one_of_the_recipe() -> None:
    source = (ROOT / "remix" / "reporting" / "findings.py").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([a-z_.0-9]+)`", source) if "." in name}
    recipe = load_recipe(ROOT / "recipes" / "embedded" / "remix_grpo.yaml").model_dump(mode="json")
    keys = {f"{prefix}{key}" for prefix, block in (("", recipe), ("eval.", recipe["eval"])) for key in flat(block)}
    assert len(named) > 15
    unknown = {name for name in named if not any(key == name or key.startswith(f"{name}.") for key in keys)}
    assert unknown == set()
