"""Proximal log-probs from the forward of the first update, where one update is over all samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from remix.replay import read_shard, shard_path
from tests.tiny import MIX, opened, tiny_recipe, weights_of

# AdamW makes of the rounding of a gradient near 0 a whole step, but for a larger eps.
KEYS: dict[str, Any] = {"steps": 3, "batch": {"minibatches": 1}, "optimizer": {"lr": 1e-3, "eps": 1e-3}}
CASES: dict[str, dict[str, Any]] = {
    "on_policy": {"phases": [{"type": "on_policy"}]},
    "mix_policy": {"phases": [MIX[0] | {"utd_ratio": 3}]},
    "lora": {"phases": [MIX[0] | {"utd_ratio": 2}], "adapter": {"type": "lora", "rank": 4, "alpha": 8}},
    "gspo": {"objective": {"type": "gspo"}, "phases": MIX},
}


def run(
    tiny_model: Path, run_dir: Path, keys: dict[str, Any], *, before: bool = False
) -> tuple[dict[str, torch.Tensor], int]:
    """The weights at the end, and how many responses were scored before updates; `before`: all, whatever the recipe."""
    scored = 0
    with opened(tiny_recipe(tiny_model, run_dir, KEYS | keys)) as trainer:
        trainer.experience.defers &= not before
        score = trainer.policy.score

        def counted(rollouts: Any, **more: Any) -> Any:
            nonlocal scored
            scored += len(rollouts) * (more.get("anchor") is None)
            return score(rollouts, **more)

        trainer.policy.score = counted  # type: ignore[method-assign]
        trainer.fit()
        return weights_of(trainer), scored


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same(tiny_model: Path, tmp_path: Path, case: str) -> None:
    found, scored = run(tiny_model, tmp_path / "deferred", CASES[case])
    assert scored == 0
    expected, scored = run(tiny_model, tmp_path / "before", CASES[case], before=True)
    assert scored > 0
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)
    for step in range(KEYS["steps"]):
        ours, theirs = (
            [rollout for group in read_shard(shard_path(tmp_path / name, step)) for rollout in group.rollouts]
            for name in ("deferred", "before")
        )
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.response_ids, other.response_ids)
            assert one.behaviour_logprobs is not None
            torch.testing.assert_close(one.behaviour_logprobs, other.behaviour_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "keys",
    [
        {"batch": {"minibatches": 2}},
        {"kl": {"place": "reward", "weight": 0.1}},
        {"advantage": {"type": "gae", "critic": {"type": "shared"}}},
        {"adapter": {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}},
    ],
    ids=["minibatches", "kl in the reward", "gae", "dropout"],
)
def test_where_they_are_asked_for_before(tiny_model: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Later minibatches would see another policy, rewards and values need them, and dropout says others."""
    _, scored = run(tiny_model, tmp_path, {"steps": 1} | keys)
    assert scored > 0


def test_what_was_not_trained_on_is_not_replayed(tiny_model: Path, tmp_path: Path) -> None:
    """No update has said the log-probs of a response that was cut off."""
    keys = {"steps": 3, "phases": MIX, "rollout": {"mask_overlong": True, "max_tokens": 6}}
    keys["rewards"] = [{"type": "length", "free_tokens": 1, "max_tokens": 6}]
    run(tiny_model, tmp_path, keys)
    rollouts = [r for step in range(3) for g in read_shard(shard_path(tmp_path, step)) for r in g.rollouts]
    assert {r.truncated for r in rollouts} == {True, False}
    assert all((r.behaviour_logprobs is None) == r.truncated for r in rollouts)
