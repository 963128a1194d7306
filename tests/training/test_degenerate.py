"""The cases that prove the algorithm, through the trainer that a recipe builds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from remix.algorithms import clipped_surrogate, mix_ppg
from remix.replay import read_shard, shard_path
from remix.tracking.token_stats import TokenStats
from tests.tiny import MIX, opened, tiny_recipe, weights_of

GAE = {"type": "gae", "whiten": False, "critic": {"type": "shared"}}


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/") and k != "phase"} for line in lines]


def trained(recipe: Any) -> dict[str, torch.Tensor]:
    with opened(recipe) as trainer:
        trainer.fit()
        return weights_of(trainer)


@pytest.mark.parametrize("advantage", [{"type": "grpo"}, GAE], ids=["grpo", "gae"])
def test_no_replay_and_one_pass_is_plain_on_policy_bit_for_bit(
    tiny_model: Path, tmp_path: Path, advantage: dict[str, Any]
) -> None:
    shared = {"steps": 3, "advantage": advantage}
    mixed = {"type": "mix_policy", "off_policy_fraction": 0.0, "utd_ratio": 1}
    a = trained(tiny_recipe(tiny_model, tmp_path / "a", {**shared, "phases": [mixed]}))
    b = trained(tiny_recipe(tiny_model, tmp_path / "b", {**shared, "phases": [{"type": "on_policy"}]}))
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert len(metrics_of(tmp_path / "a")) == 3
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], initial) for name, initial in _initial(tiny_model, tmp_path).items())


def _initial(tiny_model: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    with opened(tiny_recipe(tiny_model, tmp_path / "initial")) as trainer:
        return weights_of(trainer)


def test_a_fresh_batch_has_the_loss_of_the_clipped_surrogate(tiny_model: Path, tmp_path: Path) -> None:
    """All lags 0: proximal and behaviour are the same tensor, so ρ = 1."""
    with opened(tiny_recipe(tiny_model, tmp_path, {"kl": {"weight": 0}, "objective": {"entropy_weight": 0}})) as t:
        samples = _samples(t, step=0)
        assert {s.policy_lag for s in samples} == {0}
        terms = t.updater.accumulate(samples, TokenStats(), kl_lambda=1.0)
        expected = 0.0
        for sample in samples:
            assert sample.proximal_logprobs is not None
            assert sample.rollout.behaviour_logprobs is not None
            behaviour, advantages = sample.rollout.behaviour_logprobs, sample.advantages
            assert torch.equal(sample.proximal_logprobs, behaviour)
            expected += clipped_surrogate(behaviour, behaviour, advantages).sum().item()
        expected /= sum(s.num_tokens for s in samples)
        assert terms == {"loss/policy": pytest.approx(expected, abs=1e-6)}


def test_at_the_precedent_of_update_no_token_is_clipped_and_the_gradient_is_rho_weighted(
    tiny_model: Path, tmp_path: Path
) -> None:
    """θ = π_k on replayed rollouts: the gradient of the loss is that of -Σ ρ·A·log π_θ / tokens."""
    changes = {
        "steps": 3,
        "phases": MIX,
        "kl": {"weight": 0},
        "objective": {"entropy_weight": 0},
        "optimizer": {"lr": 0.003},
    }
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        for step in range(2):
            t._finish(step, t._step(step))
        samples = _samples(t, step=2)
        lags = {s.policy_lag for s in samples}
        assert lags == {0, 1, 2}
        stale = [s for s in samples if s.policy_lag]
        rho = torch.cat([(s.proximal_logprobs - s.rollout.behaviour_logprobs).exp() for s in stale])
        assert rho.std() > 0.05, "the policy has moved, or this test shows nothing"

        stats = TokenStats()
        t.updater.model.zero_grad()
        t.updater.accumulate(samples, stats, kl_lambda=1.0)
        gradient = _gradients(t)
        metrics = stats.metrics()
        assert [metrics[f"clip_fraction/lag={lag}"] for lag in (0, 1, 2)] == [0, 0, 0]
        assert metrics["ratio/mean/lag=0"] == pytest.approx(1.0, abs=1e-5)
        assert metrics["ratio/mean"] != pytest.approx(1.0, abs=1e-3)

        t.updater.model.zero_grad()
        tokens = sum(s.num_tokens for s in samples)
        for sample in samples:
            batch_ids = torch.cat([sample.rollout.prompt_ids, sample.rollout.response_ids])[None]
            logits = t.policy.module.lm(batch_ids).logits[0, :-1]
            logprobs = logits.log_softmax(-1).gather(-1, batch_ids[0, 1:, None])[-sample.num_tokens :, 0]
            weight = (sample.proximal_logprobs - sample.rollout.behaviour_logprobs).exp()
            (-(weight * sample.advantages * logprobs).sum() / tokens).backward()
        for name, expected in _gradients(t).items():
            largest = max(1.0, expected.abs().max().item())  # rounding is of the order of what is summed
            torch.testing.assert_close(gradient[name], expected, atol=2e-6 * largest, rtol=1e-4)


def test_replayed_rollouts_keep_the_log_probs_they_were_born_with(tiny_model: Path, tmp_path: Path) -> None:
    """Recomputing them under the current policy would make every ratio 1: replay in name only."""
    changes = {"steps": 3, "phases": MIX, "optimizer": {"lr": 0.003}}
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        for step in range(2):
            t._finish(step, t._step(step))
        born = {
            r.seed: r.behaviour_logprobs
            for step in range(2)
            for group in read_shard(shard_path(tmp_path, step))
            for r in group.rollouts
        }
        replayed = [s for s in _samples(t, step=2) if s.policy_lag]
        assert replayed
        for sample in replayed:
            assert torch.equal(sample.rollout.behaviour_logprobs, born[sample.rollout.seed])
            assert not torch.allclose(sample.proximal_logprobs, sample.rollout.behaviour_logprobs, atol=1e-3)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.parametrize("objective", ["mix_ppg", "gspo", "cispo"])
@pytest.mark.parametrize("advantage", [{"type": "grpo"}, GAE], ids=["grpo", "gae"])
def test_any_split_into_microbatches_gives_the_same_gradient(
    tiny_model: Path, tmp_path: Path, aggregate: str, objective: str, advantage: dict[str, Any]
) -> None:
    changes = {
        "steps": 3,
        "phases": MIX,
        "advantage": advantage,
        "objective": {"type": objective, "aggregate": aggregate, "entropy_weight": 0.01},
        "kl": {"weight": 0.1, "lambda_schedule": {"start": 0.5, "drop": 0.0}},
    }
    gradients, terms = {}, {}
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        t._finish(0, t._step(0))
        samples = _samples(t, step=1)
        for budget in (10**6, 64, 1):  # one micro-batch, several, one sequence each
            t.updater.recipe = t.recipe.model_copy(
                update={"batch": t.recipe.batch.model_copy(update={"tokens_per_microbatch": budget})}
            )
            t.updater.model.zero_grad()
            terms[budget] = t.updater.accumulate(samples, TokenStats(), kl_lambda=0.5)
            gradients[budget] = _gradients(t)
    for budget in (64, 1):
        assert terms[budget] == pytest.approx(terms[10**6], rel=1e-4, abs=1e-6)
        for name, expected in gradients[10**6].items():
            torch.testing.assert_close(gradients[budget][name], expected, atol=3e-6, rtol=1e-3)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[1].values())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "full"])
def test_kl_convex_at_its_ends_knows_one_anchor_only(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """λ = 1: the precedent may be anything. λ = 0: the reference may be anything."""
    changes = {
        "kl": {"weight": 1.0, "estimator": kind, "lambda_schedule": {"start": 0.5, "drop": 0.0}},
        "objective": {"entropy_weight": 0},
        "optimizer": {"lr": 0.003},
    }
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        t._finish(0, t._step(0))
        t.policy.precedent = {name: 1.1 * tensor for name, tensor in t.policy.precedent.items()}
        for kl_lambda, irrelevant in ((1.0, "precedent"), (0.0, "reference")):
            terms = []
            for scale in (1.0, 3.0):
                before = getattr(t.policy, irrelevant)
                setattr(t.policy, irrelevant, {name: scale * tensor for name, tensor in before.items()})
                samples = _samples(t, step=1)
                terms.append(t.updater.accumulate(samples, TokenStats(), kl_lambda=kl_lambda)["loss/kl"])
                setattr(t.policy, irrelevant, before)
            assert terms[0] == terms[1]
            middle = t.updater.accumulate(samples, TokenStats(), kl_lambda=0.5)["loss/kl"]
            assert middle != pytest.approx(terms[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "full"])
def test_the_kl_to_a_policy_that_is_the_anchor_is_zero(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """Step 0: reference, precedent and policy are one. The gradient is 0 too, but for k1, whose is A-free noise."""
    changes = {
        "kl": {"weight": 1.0, "estimator": kind, "lambda_schedule": {"start": 0.5, "drop": 0.0}},
        "objective": {"entropy_weight": 0},
    }
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        samples = _samples(t, step=0)
        plain = _gradient_of(t, samples, weight=0.0)
        with_kl = _gradient_of(t, samples, weight=1.0)
        terms = t.updater.accumulate(samples, TokenStats(), kl_lambda=0.5)
        assert terms["loss/kl"] == pytest.approx(0.0, abs=1e-6)
        difference = max((with_kl[name] - plain[name]).abs().max().item() for name in plain)
        assert difference > 1e-3 if kind == "k1" else difference < 1e-5


def test_the_exact_kl_is_what_the_estimators_estimate(tiny_model: Path, tmp_path: Path) -> None:
    """Mean of k1 over many tokens against the full sum over the vocabulary, on fresh tokens of a moved policy."""
    values = {}
    for kind in ("k1", "k3", "full"):
        changes = {
            "steps": 3,
            "kl": {"weight": 1.0, "estimator": kind, "importance_weighted": "none"},
            "optimizer": {"lr": 0.005},
            "rollout": {"group_size": 16},
            "batch": {"prompts": 16, "minibatches": 1},
        }
        with opened(tiny_recipe(tiny_model, tmp_path / kind, changes)) as t:
            moved = t.policy.module.lm.get_input_embeddings().weight
            with torch.no_grad():
                moved += 0.05 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
            terms = t.updater.accumulate(_samples(t, step=0), TokenStats(), kl_lambda=1.0)
            values[kind] = terms["loss/kl"]
    assert values["full"] > 0.01
    assert values["k3"] == pytest.approx(values["full"], rel=0.15)
    assert values["k1"] == pytest.approx(values["full"], rel=0.35)


def test_reincarnation_makes_the_policy_its_own_reference_at_once(tiny_model: Path, tmp_path: Path) -> None:
    phases = [{**MIX[0], "until": [{"type": "steps", "after": 2}]}, {"type": "on_policy"}]
    changes = {
        "steps": 4,
        "phases": phases,
        "batch": {"minibatches": 1},
        "optimizer": {"lr": 0.003},
        "kl": {"weight": 0.1, "lambda_schedule": {"start": 0.9, "hold": 1, "every": 1, "drop": 0.2}},
    }
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        t.fit()
        lines = metrics_of(tmp_path)
        assert t.state.phase.reincarnations == [2]
        assert t.replay.versions == []  # emptied, and the last phase needs none
    assert lines[1]["kl/reference"] > 1e-3
    # One update from π_T: its forward pass is still at the reference.
    assert lines[2]["kl/reference"] == pytest.approx(0.0, abs=1e-6)
    assert lines[3]["kl/reference"] > 1e-4
    assert [line["kl/lambda"] for line in lines] == pytest.approx([0.9, 0.9, 0.9, 0.9])  # the clock starts again
    assert [line["batch/replayed"] for line in lines][2:] == [0, 0]


def test_more_than_one_reincarnation(tiny_model: Path, tmp_path: Path) -> None:
    phases = [
        {**MIX[0], "until": [{"type": "steps", "after": 1}]},
        {**MIX[0], "until": [{"type": "rollouts", "after": 1}]},
        {"type": "on_policy"},
    ]
    with opened(tiny_recipe(tiny_model, tmp_path, {"steps": 3, "phases": phases})) as t:
        t.fit()
        assert t.state.phase.reincarnations == [1, 2]
        assert t.state.phase.index == 2


def test_zero_critic_without_discount_gives_every_token_the_final_reward(tiny_model: Path, tmp_path: Path) -> None:
    with opened(tiny_recipe(tiny_model, tmp_path, {"advantage": GAE})) as t:
        samples = _samples(t, step=0)
        assert len({s.rollout.score.value for s in samples}) > 1
        for sample in samples:
            reward = torch.full((sample.num_tokens,), sample.rollout.score.value)
            torch.testing.assert_close(sample.advantages, reward)
            torch.testing.assert_close(sample.returns, reward)


def test_values_and_advantages_of_replayed_rollouts_are_todays(tiny_model: Path, tmp_path: Path) -> None:
    changes = {"steps": 2, "phases": MIX, "advantage": GAE, "optimizer": {"lr": 0.01, "critic_lr": 0.1}}
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        t._finish(0, t._step(0))
        stale = [s for s in _samples(t, step=1) if s.policy_lag == 1]
        assert stale
        for sample in stale:
            now = t.policy.score([sample.rollout], tokens_per_microbatch=4096, with_values=True)[0]
            torch.testing.assert_close(sample.values, now.values, atol=1e-5, rtol=1e-4)
            # γ = λ = 1: A_t = R - V_t
            torch.testing.assert_close(
                sample.advantages, sample.rollout.score.value - sample.values, atol=1e-5, rtol=1e-4
            )
            assert sample.values.abs().max() > 1e-3


def test_mix_ppg_equals_the_surrogate_around_rho(tiny_model: Path, tmp_path: Path) -> None:
    """Shifting behaviour and proximal by the same amount shifts r and ρ alike: the clip stays where it was."""
    logprobs, behaviour = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.3, -1.4]])
    advantages = torch.tensor([[1.0, -1.0]])
    assert torch.equal(
        mix_ppg(logprobs, behaviour, behaviour, advantages), clipped_surrogate(logprobs, behaviour, advantages)
    )
    # r = e^0.3 = 1.3499 is clipped to 1.2; r = e^-0.6 = 0.5488 is clipped to 0.8 (A < 0: max of 0.5488, 0.8)
    assert mix_ppg(logprobs, behaviour, behaviour, advantages)[0].tolist() == pytest.approx([-1.2, 0.8])
    # ρ = e^0.3: r sits in the middle of its range and keeps its own value
    assert mix_ppg(logprobs, behaviour, logprobs, advantages)[0].tolist() == pytest.approx(
        [-math.exp(0.3), math.exp(-0.6)]
    )


def _samples(t: Any, step: int) -> list[Any]:
    """The samples that `step` would train on, by the trainer's own calls."""
    from remix.tracking.stopwatch import Stopwatch

    watch = Stopwatch(lambda stage: None)
    position = t.state.prompt_position
    fresh, _ = t._sample(t._phase, step, watch)
    t.state.prompt_position = position  # asked again, it answers the same
    if t.policy.precedent is None:
        t.policy.begin_step(keep_precedent=t.recipe.kl.uses_precedent)
    replayed = t._draw(t._phase, step, len(fresh))
    _, samples = t.experience.prepare(fresh, replayed, step=step, kl_lambda=0.5, reference_since=0)
    return samples


def _gradients(t: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in t.policy.module.named_parameters()
        if parameter.grad is not None
    }


def _gradient_of(t: Any, samples: list[Any], weight: float) -> dict[str, torch.Tensor]:
    t.updater.objective.kl = t.recipe.kl.model_copy(update={"weight": weight})
    t.updater.model.zero_grad()
    t.updater.accumulate(samples, TokenStats(), kl_lambda=0.5)
    t.updater.objective.kl = t.recipe.kl
    return _gradients(t)
