"""One step: which responses it trains on, how they are weighed, what stops it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from remix.algorithms import group_relative_advantage, kl_estimate
from remix.errors import TrainingError
from remix.tracking.stopwatch import Stopwatch
from remix.tracking.token_stats import TokenStats
from tests.tiny import MIX, opened, run, tiny_recipe, weights_of
from tests.training.test_degenerate import GAE, metrics_of


def test_sampler_mismatch_is_weighed_and_truncated(tiny_model: Path, tmp_path: Path) -> None:
    """An engine whose log-probs are off by ±ln 2: w = min(π/μ, c) is 2 or 1/2, and 1.5 where the cap cuts it."""
    changes = {"kl": {"weight": 0}, "objective": {"entropy_weight": 0, "sampler_weight_cap": 1.5}}
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        samples = t.experience.prepare(
            t._sample(t._phase, 0, Stopwatch(lambda _: None))[0], [], step=0, kl_lambda=1.0, reference_since=0
        )[1]
        plain = t.updater.accumulate(samples, TokenStats(), kl_lambda=1.0)["loss/policy"]
        t.updater.objective.sampler_weight_cap = t.recipe.objective.sampler_weight_cap  # as under another engine
        for shift, weight in ((math.log(2), 0.5), (-math.log(2), 1.5)):
            off = [
                replace(s, rollout=replace(s.rollout, sampler_logprobs=s.rollout.behaviour_logprobs + shift))
                for s in samples
            ]
            weighed = t.updater.accumulate(off, TokenStats(), kl_lambda=1.0)["loss/policy"]
            assert weighed == pytest.approx(weight * plain, rel=1e-4)


def test_truncated_responses_can_be_left_out(tiny_model: Path, tmp_path: Path) -> None:
    for masked in (False, True):
        changes = {"rollout": {"mask_overlong": masked}, "steps": 1}
        run(tiny_recipe(tiny_model, tmp_path / str(masked), changes))
    (plain,), (masked_line,) = metrics_of(tmp_path / "False"), metrics_of(tmp_path / "True")
    table = pq.read_table(tmp_path / "True" / "rollouts" / "step=000000.parquet").to_pylist()
    truncated = [row for row in table if row["finish_reason"] == "length" and row["replayable"]]
    assert truncated
    assert plain["batch/left_out"] == 0
    assert masked_line["batch/left_out"] == len(truncated)
    whole = [row for row in table if row["finish_reason"] == "stop" and row["replayable"]]
    assert masked_line["tokens/lag=0"] == 1 * sum(len(row["response_ids"]) for row in whole)


def test_groups_with_equal_rewards_are_sampled_anew(tiny_model: Path, tmp_path: Path) -> None:
    """A third of the groups hold no '#' or nothing but."""
    changes = {
        "steps": 1,
        "rewards": [{"type": "format", "pattern": "(?s).*#.*"}],
        "rollout": {"refill": {"max_rounds": 8}},
    }
    recipe = tiny_recipe(tiny_model, tmp_path, changes)
    with opened(recipe) as t:
        t.fit()
        position = t.state.prompt_position
    (line,) = metrics_of(tmp_path)
    assert line["rollouts/fresh"] == 4 * position > 4 * recipe.batch.prompts
    rows = pq.read_table(tmp_path / "rollouts" / "step=000000.parquet").to_pylist()
    by_group: dict[int, set[float]] = {}
    for row in rows:
        by_group.setdefault(row["group"], set()).add(row["reward"])
    kept = {row["group"] for row in rows if row["replayable"]}
    assert all((len(rewards) > 1) == (group in kept) for group, rewards in by_group.items())
    assert len(kept) == recipe.batch.prompts == line["batch/rollouts"] / 4


def test_kl_in_the_reward_comes_off_the_advantage(tiny_model: Path, tmp_path: Path) -> None:
    changes = {
        "steps": 2, "kl": {"weight": 0.3, "estimator": "k1", "place": "reward"}, "optimizer": {"lr": 0.003},
    }  # fmt: skip
    run(tiny_recipe(tiny_model, tmp_path, changes))
    rows = [
        row for row in pq.read_table(tmp_path / "rollouts" / "step=000001.parquet").to_pylist() if row["replayable"]
    ]
    rewards = []
    for row in rows:
        behaviour, reference = torch.tensor(row["behaviour_logprobs"]), torch.tensor(row["reference_logprobs"])
        rewards.append(row["reward"] - 0.3 * kl_estimate(behaviour, reference, "k1").sum().item())
    expected = group_relative_advantage(torch.tensor(rewards), 4)
    assert [row["advantage"][0] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    assert "loss/kl" not in metrics_of(tmp_path)[1]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_touched(
    tiny_model: Path, tmp_path: Path
) -> None:
    with opened(tiny_recipe(tiny_model, tmp_path)) as t:
        before = weights_of(t)
        t.updater.objective.kl = t.recipe.kl.model_copy(update={"weight": math.inf})
        assert t._step(0)["updates/skipped"] == 2
        with pytest.raises(TrainingError, match=r"step 1: .*not finite in 4 updates in a row.*lower optimizer\.lr"):
            t._step(1)
        assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(t).items())


def test_rollouts_with_nan_log_probs_are_counted_and_left_out(tiny_model: Path, tmp_path: Path) -> None:
    with opened(tiny_recipe(tiny_model, tmp_path)) as t:
        score, poisoned = t.policy.score, []

        def poison(rollouts: Any, **options: Any) -> Any:
            scores = score(rollouts, **options)
            if not poisoned:
                poisoned.append(True)
                scores[1].logprobs[0] = math.nan
            return scores

        t.policy.score = poison
        metrics = t._step(0)
        assert metrics["batch/left_out"] == 1
        assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))


def test_each_pass_is_an_optimiser_step_a_minibatch_and_the_critic_has_its_own_rate(
    tiny_model: Path, tmp_path: Path
) -> None:
    phase = {"type": "mix_policy", "utd_ratio": 3}
    changes = {"steps": 1, "phases": [phase], "advantage": GAE, "optimizer": {"lr": 1e-4, "critic_lr": 3e-2}}
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        t.fit()
        counts = {int(state["step"]) for state in t.updater.optimizer.state.values()}
        assert counts == {3 * 2}  # 3 passes of 2 minibatches
        assert {g["name"]: g["lr"] for g in t.updater.optimizer.param_groups} == {"policy": 1e-4, "critic": 3e-2}
        # Adam's first steps are of the size of the rate: 6 of 3e-2 for the head, which began at zero.
        assert 0.01 < t.policy.module.value_head.weight.abs().max() < 0.2


def test_the_kl_of_replayed_tokens_is_weighed_by_the_ratio(tiny_model: Path, tmp_path: Path) -> None:
    """Σ over tokens of w·k3 with w = π/π_b where the lag is above 0 and 1 elsewhere, over the number of tokens."""
    changes = {
        "steps": 3, "phases": MIX, "kl": {"weight": 1.0}, "objective": {"entropy_weight": 0},
        "optimizer": {"lr": 0.003},
    }  # fmt: skip
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        t._finish(0, t._step(0))
        fresh, _ = t._sample(t._phase, 1, Stopwatch(lambda _: None))
        samples = t.experience.prepare(
            fresh, t._draw(t._phase, 1, len(fresh)), step=1, kl_lambda=1.0, reference_since=0
        )[1]
        assert {s.policy_lag for s in samples} == {0, 1}
        term = t.updater.accumulate(samples, TokenStats(), kl_lambda=1.0)["loss/kl"]
    weighed, plain = 0.0, 0.0
    for s in samples:  # θ = π_k, so the policy's log-probs are the proximal ones
        k3 = kl_estimate(s.proximal_logprobs, s.rollout.reference_logprobs, "k3")
        ratio = (s.proximal_logprobs - s.rollout.behaviour_logprobs).exp()
        weighed += ((ratio if s.policy_lag else 1.0) * k3).sum().item()
        plain += k3.sum().item()
    tokens = sum(s.num_tokens for s in samples)
    assert term == pytest.approx(weighed / tokens, rel=1e-3)
    assert weighed != pytest.approx(plain, rel=5e-3)


def test_a_response_that_could_not_be_graded_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Nor does it count in its group's baseline: the others' advantages have mean 0 among themselves."""
    with opened(tiny_recipe(tiny_model, tmp_path, {"advantage": {"type": "dr_grpo"}})) as t:
        fresh, _ = t._sample(t._phase, 0, Stopwatch(lambda _: None))
        first = fresh[0]
        lost = replace(first.rollouts[2], score=replace(first.rollouts[2].score, verdict="timeout", value=-9.0))
        rollouts = (*first.rollouts[:2], lost, *first.rollouts[3:])
        groups = [replace(first, rollouts=rollouts), *fresh[1:]]
        samples = t.experience.prepare(groups, [], step=0, kl_lambda=1.0, reference_since=0)[1]
    assert len(samples) == 4 * len(groups) - 1
    assert lost.seed not in {s.rollout.seed for s in samples}
    of_group = [s for s in samples if s.rollout.seed in {r.seed for r in first.rollouts}]
    rewards = [s.rollout.score.value for s in of_group]
    assert [s.advantages[0].item() for s in of_group] == pytest.approx(
        [reward - sum(rewards) / 3 for reward in rewards], abs=1e-6
    )


def test_a_broken_policy_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    with opened(tiny_recipe(tiny_model, tmp_path)) as t:
        with torch.no_grad():
            t.policy.module.lm.model.norm.weight.fill_(math.nan)
        with pytest.raises(TrainingError, match="step 0: the log-probs of every response are NaN"):
            t._step(0)
