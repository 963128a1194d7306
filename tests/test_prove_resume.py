"""A part of the proof that a resumed run is the run it would have been; `scripts/prove_resume.py` runs it whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from remix.replay import logged_steps
from scripts.prove_resume import Case, all_cases, differences, prove

CASES = {
    Case("remix_ppo", "none", "hf", 1): 1,
    Case("remix_grpo", "lora", "hf", 2): 1,
    Case("remix_grpo", "none", "vllm", 1): 0,  # whose samples are to be abandoned; what is resumed is no other state
}
"""With how many SIGKILLs, beside a SIGTERM each."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_killed_and_resumed_is_the_same_run(case: Case, tmp_path: Path) -> None:
    verdict = prove(case, tmp_path, kills=CASES[case], seed=0)
    assert len(verdict.kills) == CASES[case] + 1, "struck too late to prove anything"
    assert verdict.differences == []
    # And the comparison sees what differs.
    whole, pieces = tmp_path / "whole" / "run", tmp_path / "pieces" / "run"
    lines = (pieces / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(lines[3])
    changed["loss/policy"] += 1e-9
    (pieces / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]) + "\n")
    (shard, *_), (other, *_) = (logged_steps(of)[step] for of, step in ((whole, 1), (pieces, 2)))
    shutil.copy(shard, other)
    said = " ".join(differences(whole, pieces))
    assert "step 3, loss/policy" in said
    assert f"rollouts/{other.name}" in said


def test_the_matrix_is_whole() -> None:
    assert len(all_cases()) == 4 * 2 * 2 * 2 + 8
    assert CASES.keys() < set(all_cases())
