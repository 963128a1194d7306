"""Log-probs are transformers' own, anchors are the models that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from remix.models.actor_critic import ActorCritic
from remix.models.adapters import save_model
from remix.models.policy import Policy, token_tensors
from tests.models.policies import (
    LORAS,
    ROLLOUTS,
    assert_close,
    assert_unchanged,
    batch_of,
    bits,
    differ,
    moved,
    plain,
    plain_logprobs,
    policy_of,
    scored,
)
from tests.tiny import make_tiny_model

# --- log-probs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [1, 16, 30, 10_000])
def test_score_is_transformers_log_softmax(any_model: Path, temperature: float, budget: int) -> None:
    policy = policy_of(any_model, temperature)
    found = scored(policy, budget)
    assert [len(row) for row in found] == [5, 1, 2, 11, 4]
    assert all(row.dtype == torch.float32 for row in found)
    assert_close(found, plain_logprobs(plain(any_model), temperature))


def test_scores_do_not_hold_their_microbatch(tiny_model: Path) -> None:
    for score in scored(policy_of(tiny_model)):
        assert score.untyped_storage().nbytes() == 4 * len(score)


@pytest.mark.parametrize("estimator", ["none", "full"])
def test_chunked_logits_are_the_unchunked(any_model: Path, estimator: str) -> None:
    outputs, gradients = [], []
    ids, mask = token_tensors(ROLLOUTS)
    # 23 trained tokens: in one piece, in pieces of 4 with a rest of 3, one by one.
    assert mask.sum() == 23
    for chunk in (2048, 4, 1):
        policy = policy_of(any_model, 0.7, model={"path": str(any_model), "logits_chunk": chunk})
        anchor = policy.snapshot()
        moved(policy, scale=0.02)
        anchors = ()
        if estimator == "full":
            anchors = (policy.anchor_states(batch_of(ids, mask), anchor),)
        output = policy.module(ids, mask, 0.7, anchors)
        loss = output.logprobs.square().sum() + output.entropy.sum() + sum(d.sum() for d in output.divergences)
        loss.backward()
        outputs.append([output.logprobs, output.entropy, *output.divergences])
        gradients.append({name: p.grad for name, p in policy.module.named_parameters()})
    for other_outputs, other_gradients in zip(outputs[1:], gradients[1:], strict=True):
        for one, other in zip(outputs[0], other_outputs, strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
        for name, gradient in gradients[0].items():
            assert gradient.abs().max() > 0, name
            scale = gradient.abs().max().item()
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5 * max(scale, 1.0), rtol=1e-4)


@torch.no_grad()
def test_entropy_and_exact_kl_by_transformers_logits(tiny_untied_model: Path) -> None:
    temperature = 0.7
    policy = policy_of(tiny_untied_model, temperature)
    anchor, before = policy.snapshot(), plain(tiny_untied_model)
    moved(policy, scale=0.02)
    ids, mask = token_tensors(ROLLOUTS)
    states = policy.anchor_states(batch_of(ids, mask), anchor)
    output = policy.module(ids, mask, temperature, (states,))
    for row, rollout in enumerate(ROLLOUTS):
        sequence = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
        new, old = (lm(sequence).logits[0, :-1].div(temperature) for lm in (policy.module.lm, before))
        p, q = new.log_softmax(-1), old.log_softmax(-1)
        where = torch.arange(len(rollout.prompt_ids) - 1, sequence.shape[1] - 1)
        entropy, kl = -(p.exp() * p).sum(-1)[where], (p.exp() * (p - q)).sum(-1)[where]
        torch.testing.assert_close(output.entropy[row, where], entropy, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.divergences[0][row, where], kl, atol=1e-5, rtol=1e-4)
    assert (output.divergences[0][mask] > 0).all()
    assert (output.logprobs[~mask] == 0).all()
    assert (output.entropy[~mask] == 0).all()


# --- anchors ------------------------------------------------------------------------------------------------------


def test_an_anchor_scores_as_the_model_that_holds_its_weights(any_model: Path, tmp_path: Path) -> None:
    policy = policy_of(any_model)
    moved(policy, seed=1)
    anchor = policy.snapshot()
    save_model(policy.module.lm, policy.tokenizer, tmp_path, base_changed=False)
    at_snapshot = scored(policy)
    moved(policy, seed=2)
    before = bits(policy.module)

    under_anchor = scored(policy, anchor=anchor)
    assert differ(under_anchor, scored(policy)) > 0.1
    assert all(torch.equal(a, b) for a, b in zip(under_anchor, at_snapshot, strict=True))
    assert_close(under_anchor, plain_logprobs(plain(tmp_path)))
    assert_unchanged(policy.module, before)


def test_a_snapshot_is_a_copy_of_the_policy_without_its_critic(tiny_model: Path) -> None:
    policy = policy_of(tiny_model, advantage={"type": "gae", "critic": {"type": "shared"}})
    snapshot = policy.snapshot()
    trained = {n for n, p in policy.module.named_parameters() if p.requires_grad}
    assert snapshot.keys() == trained - {"value_head.weight", "value_head.bias"}
    first = next(iter(snapshot))
    kept = snapshot[first].clone()
    moved(policy)
    assert torch.equal(snapshot[first], kept)
    assert not snapshot[first].requires_grad


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_first_snapshot_of_a_lora_is_the_base_model(tiny_model: Path, kind: str) -> None:
    policy = policy_of(tiny_model, adapter=LORAS[kind])
    reference = policy.snapshot()
    assert all(".lora_" in name for name in reference)
    moved(policy)
    under_reference = scored(policy, anchor=reference)
    with policy.module.lm.disable_adapter():
        disabled = scored(policy)
    assert all(torch.equal(a, b) for a, b in zip(under_reference, disabled, strict=True))
    assert_close(under_reference, plain_logprobs(plain(tiny_model)))
    assert differ(under_reference, scored(policy)) > 0.1


def test_the_first_snapshot_of_a_dora_is_the_base_model_but_for_rounding(tiny_model: Path) -> None:
    """Its magnitude is divided by the very norm that it was set to."""
    policy = policy_of(tiny_model, adapter=LORAS["dora"])
    reference = policy.snapshot()
    moved(policy)
    assert_close(scored(policy, anchor=reference), plain_logprobs(plain(tiny_model)), atol=1e-4)


def test_dropout_is_off_wherever_a_policy_is_only_asked(tiny_model: Path) -> None:
    policy = policy_of(tiny_model, adapter={**LORAS["lora"], "dropout": 0.5})
    moved(policy)
    anchor, at_rest = policy.snapshot(), scored(policy)
    ids, mask = token_tensors(ROLLOUTS)
    policy.module.eval()
    expected = policy.anchor_states(batch_of(ids, mask), anchor).hidden
    policy.module.train()
    assert torch.equal(policy.anchor_states(batch_of(ids, mask), anchor).hidden, expected)
    assert policy.module.training
    assert differ(at_rest, scored(policy)) == 0


def test_the_precedent_is_one_step_behind(tiny_model: Path) -> None:
    policy = policy_of(tiny_model)
    seen = []
    for step in range(3):
        policy.begin_step(keep_precedent=True)
        assert policy.precedent is not None
        seen.append(policy.snapshot())
        expected = seen[max(step - 1, 0)]  # before the first update there is nothing older
        assert all(torch.equal(policy.precedent[name], expected[name]) for name in expected)
        moved(policy, seed=step)
    policy.begin_step(keep_precedent=False)
    assert policy.precedent is not None
    assert all(torch.equal(policy.precedent[name], seen[1][name]) for name in seen[1]), "nobody asked: nothing moved"


# --- the critic ---------------------------------------------------------------------------------------------------


@pytest.fixture
def critics(tiny_model: Path) -> dict[str, Policy]:
    return {
        kind: policy_of(tiny_model, advantage={"type": "gae", "critic": critic})
        for kind, critic in {
            "shared": {"type": "shared"},
            "detached": {"type": "shared", "detach": True},
            "separate": {"type": "separate"},
        }.items()
    }


def test_values_start_at_zero_and_stand_before_each_token(critics: dict[str, Policy]) -> None:
    for policy in critics.values():
        scores = policy.score(ROLLOUTS, tokens_per_microbatch=16, with_values=True)
        assert all(s.values is not None and s.values.tolist() == [0.0] * len(s.logprobs) for s in scores)
        with torch.no_grad():
            policy.module.value_head.weight.fill_(0.01)
            policy.module.value_head.bias.fill_(0.5)
        scores = policy.score(ROLLOUTS, tokens_per_microbatch=16, with_values=True)
        for rollout, score in zip(ROLLOUTS, scores, strict=True):
            ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
            backbone = policy.module.critic if policy.module.critic is not None else policy.module.lm.model
            hidden = backbone(input_ids=ids)[0][0, len(rollout.prompt_ids) - 1 : -1]
            torch.testing.assert_close(score.values, 0.01 * hidden.sum(-1) + 0.5, atol=1e-4, rtol=0)
        assert all(s.values is None for s in policy.score(ROLLOUTS, tokens_per_microbatch=16))


def test_the_value_loss_reaches_the_backbone_only_where_it_may(critics: dict[str, Policy]) -> None:
    ids, mask = token_tensors(ROLLOUTS)
    reached = {}
    for kind, policy in critics.items():
        torch.nn.init.ones_(policy.module.value_head.weight)
        policy.module(ids, mask, 1.0).values.sum().backward()
        reached[kind] = any(p.grad is not None and p.grad.any() for p in policy.module.lm.parameters())
        assert policy.module.value_head.weight.grad.any()
    assert reached == {"shared": True, "detached": False, "separate": False}


# --- precision ----------------------------------------------------------------------------------------------------


def test_bfloat16_is_of_the_forward_alone(tiny_model: Path) -> None:
    model = {"path": str(tiny_model), "dtype": "bfloat16"}
    gae = {"type": "gae", "critic": {"type": "shared"}}
    policy = policy_of(tiny_model, model=model, advantage=gae)
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    adapted = policy_of(tiny_model, model=model, advantage=gae, adapter=LORAS["lora"])
    for name, parameter in adapted.module.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    exact = plain_logprobs(plain(tiny_model))
    for each in (policy, adapted):
        rows = scored(each)
        assert all(row.dtype == torch.float32 for row in rows)
        assert 1e-4 < differ(rows, exact) < 0.5
        errors = [torch.nn.functional.mse_loss(row, want).item() for row, want in zip(rows, exact, strict=True)]
        assert max(errors) < 0.02


def test_values_are_not_rounded_to_bfloat16(tiny_model: Path) -> None:
    policy = policy_of(
        tiny_model,
        model={"path": str(tiny_model), "dtype": "bfloat16"},
        advantage={"type": "gae", "critic": {"type": "shared"}},
    )
    with torch.no_grad():
        policy.module.value_head.bias.fill_(1.001)  # bfloat16 knows 1 and 1.0078
    (score,) = policy.score(ROLLOUTS[:1], tokens_per_microbatch=100, with_values=True)
    assert score.values is not None
    assert score.values.tolist() == pytest.approx([1.001] * 5, abs=1e-6)


def test_gradients_with_checkpointing_are_those_without(tiny_model: Path) -> None:
    ids, mask = token_tensors(ROLLOUTS)
    for adapter in ({"type": "none"}, LORAS["lora"]):
        found = []
        for on in (False, True):
            model = {"path": str(tiny_model), "gradient_checkpointing": on}
            policy = policy_of(tiny_model, model=model, adapter=adapter)
            moved(policy)
            policy.module.load_state_dict(found[0][1] if found else policy.module.state_dict())
            policy.module.train()
            policy.module(ids, mask, 1.0).logprobs.sum().backward()
            grads = {n: p.grad for n, p in policy.module.named_parameters() if p.requires_grad}
            found.append((grads, bits(policy.module)))
        assert all(g is not None for g in found[1][0].values())
        for name, gradient in found[0][0].items():
            torch.testing.assert_close(found[1][0][name], gradient)


def test_a_model_in_another_seed_is_another_model(tmp_path: Path, tiny_model: Path) -> None:
    """The comparisons above can fail: policies that differ differ by far more than their tolerance."""
    other = make_tiny_model(tmp_path, seed=1)
    assert differ(scored(policy_of(other)), scored(policy_of(tiny_model))) > 1.0
    assert isinstance(policy_of(other).module, ActorCritic)
