"""Reward functions that hang, die, raise or return no number: what they could not score is left out and counted."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.faults.harness import STEPS, metrics, train


def reward(name: str) -> str:
    return f"rewards=[{{type: python, function: 'tests.faults.rewards:{name}', timeout: 0.4}}]"


@pytest.mark.parametrize(
    ("name", "verdict"), [("hangs", "timeout"), ("dies", "error"), ("raises", "error"), ("nan", "error")]
)
def test_the_run_goes_on_without_what_was_not_scored(tmp_path: Path, name: str, verdict: str) -> None:
    done = train(tmp_path / "run", reward(name), "batch.prompts=4", "eval.prompts=2")
    lines = metrics(tmp_path / "run")
    assert len(lines) == STEPS
    failed = [round(line[f"verdict/{verdict}"] * line["rollouts/fresh"]) for line in lines]
    rows = [
        row for path in sorted((tmp_path / "run" / "rollouts").iterdir()) for row in pq.read_table(path).to_pylist()
    ]
    assert sum(failed) == sum(row["verdict"] == verdict for row in rows) > 0
    kept = [
        sum(r["verdict"] == verdict and r["replayable"] for r in rows if r["step"] == step) for step in range(STEPS)
    ]
    assert [line["batch/left_out"] for line in lines] == kept
    assert f"tests.faults.rewards:{name}" in done.stdout  # said once a step, with the reason


def test_a_reward_that_fails_always_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    done = train(tmp_path / "run", reward("always_raises"), status=1)
    assert "error: step 0: " in done.stderr
    assert "could not be scored (faults.unscored 0.5)" in done.stderr
    assert "the judge is down" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    train(tmp_path / "run", resume=True)  # with another reward
