"""Log-probs are transformers' own, anchors are the models that they stand for, exports are what was trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from remix.config import LoraAdapter
from remix.models.actor_critic import ActorCritic
from remix.models.adapters import ADAPTER, add_adapter, checkpoint_weights, merge_adapter, save_model
from remix.models.loading import load_actor_critic, load_tokenizer
from remix.models.policy import Policy, token_tensors
from remix.types import Batch, Rollout
from tests.tiny import make_tiny_model, tiny_recipe

CPU = torch.device("cpu")
LORAS = {
    "lora": {"type": "lora", "rank": 4, "alpha": 8},
    "rslora": {"type": "lora", "rank": 4, "alpha": 8, "rslora": True},
    "dora": {"type": "lora", "rank": 4, "alpha": 8, "dora": True},
}


@pytest.fixture(params=["tied", "untied"])
def any_model(request: pytest.FixtureRequest, tiny_model: Path, tiny_untied_model: Path) -> Path:
    return tiny_model if request.param == "tied" else tiny_untied_model


def made(length: tuple[int, int], seed: int) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    prompt, response = (torch.randint(2, 16, (n,), generator=generator) for n in length)
    return Rollout(
        prompt_ids=prompt,
        response_ids=response,
        sampler_logprobs=torch.zeros(length[1]),
        policy_version=0,
        finish_reason="length",
        seed=seed,
        text="",
    )


ROLLOUTS = [made(length, i) for i, length in enumerate([(3, 5), (1, 1), (7, 2), (2, 11), (4, 4)])]


def policy_of(path: Path, /, temperature: float = 1.0, **changes: Any) -> Policy:
    recipe = tiny_recipe(path, Path("unused"), {"rollout": {"temperature": temperature}, **changes})
    tokenizer = load_tokenizer(recipe.model)
    module = load_actor_critic(recipe, tokenizer, CPU)
    return Policy(module, tokenizer, device=CPU, temperature=temperature)


def scored(policy: Policy, budget: int = 10_000, anchor: dict[str, Tensor] | None = None) -> list[Tensor]:
    return [score.logprobs for score in policy.score(ROLLOUTS, tokens_per_microbatch=budget, anchor=anchor)]


@torch.no_grad()
def plain_logprobs(lm: Any, temperature: float = 1.0) -> list[Tensor]:
    """One sequence at a time, by transformers alone."""
    lm.eval()
    found = []
    for rollout in ROLLOUTS:
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids])
        logits = lm(ids[None]).logits[0, len(rollout.prompt_ids) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1).gather(-1, rollout.response_ids[:, None])[:, 0])
    return found


def plain(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


MERGED = 5e-5
"""W + BA is rounded once more than Wx + BAx: two or three units in the last place of logits of about 10."""


def assert_close(a: list[Tensor], b: list[Tensor], atol: float = 1e-5) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


def differ(a: list[Tensor], b: list[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(a, b, strict=True))


def moved(policy: Policy, seed: int = 1, scale: float = 0.03) -> None:
    """Away from where it was, in every trained parameter of the policy: B of a LoRA is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if parameter.requires_grad and name.startswith("lm."):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def bits(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


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


def batch_of(ids: Tensor, mask: Tensor) -> Batch:
    zero = torch.zeros(mask.shape)
    return Batch(ids, mask, zero, zero, zero, zero, torch.zeros(len(ids), dtype=torch.long))


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


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_merging_keeps_the_policy_and_starts_a_fresh_adapter(tiny_model: Path, kind: str) -> None:
    policy = policy_of(tiny_model, adapter=LORAS[kind])
    moved(policy)
    before = scored(policy)
    assert differ(before, plain_logprobs(plain(tiny_model))) > 0.1
    old_a = {n: p.clone() for n, p in policy.module.named_parameters() if ".lora_A." in n}
    trained = [n for n, p in policy.module.named_parameters() if p.requires_grad]

    merge_adapter(policy.module.lm)

    assert_close(scored(policy), before, MERGED)
    with policy.module.lm.disable_adapter():
        assert_close(scored(policy), before, MERGED)
    parameters = dict(policy.module.named_parameters())
    assert all((p == 0).all() for n, p in parameters.items() if ".lora_B." in n)
    assert all(not torch.equal(parameters[n], a) for n, a in old_a.items())
    assert [n for n, p in parameters.items() if p.requires_grad] == trained

    moved(policy)  # the fresh adapter is in force
    assert differ(scored(policy), before) > 0.1
    again = scored(policy)
    merge_adapter(policy.module.lm)
    assert_close(scored(policy), again, MERGED)


@pytest.mark.parametrize("kind", LORAS)
def test_checkpoint_weights_are_the_policy_under_the_bases_names(any_model: Path, kind: str) -> None:
    policy = policy_of(any_model, adapter=LORAS[kind])
    moved(policy)
    expected, before = scored(policy), bits(policy.module)
    weights = dict(checkpoint_weights(policy.module.lm))

    base = plain(any_model)
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in base.state_dict().items()}
    assert_unchanged(policy.module, before)
    assert differ(scored(policy), expected) == 0
    base.load_state_dict(weights)
    assert_close(plain_logprobs(base), expected, MERGED)


def test_checkpoint_weights_after_a_merge(tiny_model: Path) -> None:
    policy = policy_of(tiny_model, adapter=LORAS["lora"])
    moved(policy, seed=1)
    merge_adapter(policy.module.lm)
    moved(policy, seed=2)
    base = plain(tiny_model)
    base.load_state_dict(dict(checkpoint_weights(policy.module.lm)))
    assert_close(plain_logprobs(base), scored(policy), MERGED)


def test_checkpoint_weights_without_an_adapter_are_the_models(any_model: Path) -> None:
    policy = policy_of(any_model)
    weights = dict(checkpoint_weights(policy.module.lm))
    assert weights.keys() == plain(any_model).state_dict().keys()
    assert all(torch.equal(weights[n], t) for n, t in policy.module.lm.state_dict().items())


@pytest.mark.parametrize("kind", LORAS)
def test_a_saved_adapter_is_one_that_peft_loads(any_model: Path, tmp_path: Path, kind: str) -> None:
    policy = policy_of(any_model, adapter=LORAS[kind])
    moved(policy)
    save_model(policy.module.lm, policy.tokenizer, tmp_path, base_changed=False)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 1000
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (4, 8)
    assert (saved["use_rslora"], saved["use_dora"]) == (kind == "rslora", kind == "dora")
    assert not (tmp_path / ADAPTER).exists()
    assert (tmp_path / "tokenizer.json").exists()

    loaded = PeftModel.from_pretrained(plain(any_model), tmp_path)
    assert_close(plain_logprobs(loaded), scored(policy))
    assert differ(plain_logprobs(plain(any_model)), scored(policy)) > 0.1
    # Once more over what is there, as a resumed run would.
    save_model(policy.module.lm, policy.tokenizer, tmp_path, base_changed=False)
    assert_close(plain_logprobs(PeftModel.from_pretrained(plain(any_model), tmp_path)), scored(policy))


@pytest.mark.parametrize("kind", LORAS)
def test_an_adapter_on_a_changed_base_is_saved_merged(any_model: Path, tmp_path: Path, kind: str) -> None:
    policy = policy_of(any_model, adapter=LORAS[kind])
    moved(policy)
    before = bits(policy.module)
    save_model(policy.module.lm, policy.tokenizer, tmp_path, base_changed=True)
    assert not (tmp_path / "adapter_config.json").exists()
    assert_close(plain_logprobs(plain(tmp_path)), scored(policy), MERGED)
    assert_unchanged(policy.module, before)


def test_full_weights_are_saved_as_a_model(any_model: Path, tmp_path: Path) -> None:
    policy = policy_of(any_model, advantage={"type": "gae", "critic": {"type": "separate"}})
    moved(policy)
    save_model(policy.module.lm, policy.tokenizer, tmp_path, base_changed=False)
    loaded = plain(tmp_path)
    assert loaded.state_dict().keys() == plain(any_model).state_dict().keys(), "no critic in it"
    assert_close(plain_logprobs(loaded), scored(policy))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "embed_tokens"]])
def test_an_adapter_on_the_head_is_refused(tiny_untied_model: Path, targets: list[str]) -> None:
    with pytest.raises(ValueError, match="leave out the embedding and the output head"):
        add_adapter(plain(tiny_untied_model), LoraAdapter(targets=tuple(targets)))


# --- weights in and out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [{"type": "none"}, LORAS["lora"]], ids=["full", "lora"])
def test_weights_go_out_and_come_back(tiny_model: Path, adapter: dict[str, Any]) -> None:
    changes = {"adapter": adapter, "advantage": {"type": "gae", "critic": {"type": "shared"}}}
    policy = policy_of(tiny_model, **changes)
    moved(policy)
    weights = {n: t.clone() for n, t in policy.weights(with_base=False).items()}
    assert {"value_head.weight", "value_head.bias"} <= weights.keys()
    other = policy_of(tiny_model, **changes)
    other.load_weights(weights)
    assert differ(scored(policy), scored(other)) == 0

    with pytest.raises(ValueError, match="does not fit the recipe's model"):
        other.load_weights({n: t for n, t in weights.items() if n != "value_head.bias"})
    with pytest.raises(ValueError, match="does not fit the recipe's model"):
        other.load_weights({**weights, "lm.unknown": torch.zeros(1)})
    with pytest.raises(ValueError, match="does not fit the recipe's model"):
        other.load_weights({**weights, "value_head.bias": torch.zeros(2)})


def test_the_base_comes_along_where_it_was_changed(tiny_model: Path) -> None:
    policy = policy_of(tiny_model, adapter=LORAS["lora"])
    moved(policy)
    merge_adapter(policy.module.lm)
    moved(policy, seed=2)
    other = policy_of(tiny_model, adapter=LORAS["lora"])
    other.load_weights(copy.deepcopy(policy.weights(with_base=True)))
    assert differ(scored(policy), scored(other)) == 0


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
