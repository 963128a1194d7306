"""Every kind of adapter: what it computes, what PEFT makes of what was saved, what the engines are handed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from remix.config import LayersAdapter
from remix.models.adapters import (
    checkpoint_weights,
    merge_adapter,
    save_model,
    trained_share,
    with_saved_adapter,
)
from remix.models.layers import trained_layers
from remix.models.policy import Policy, token_tensors
from remix.rollout.hf import HFEngine
from remix.types import Request, Rollout, Sampling
from tests.models.policies import (
    CPU,
    MERGED,
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
from tests.tiny import KINDS, tiny_recipe

VIRTUAL = ("prefix", "prompt")
FOLDED = tuple(kind for kind in KINDS if kind not in VIRTUAL)
HEAD = {"type": "layers", "last_blocks": 0, "head": True}


def adapted(path: Path, kind: str, /, **changes: Any) -> Policy:
    return policy_of(path, adapter=KINDS[kind], **changes)


def peft_logprobs(lm: Any) -> list[Tensor]:
    """By PEFT's own forward, one sequence at a time; logits of virtual tokens come first."""
    lm.eval()
    found = []
    for rollout in ROLLOUTS:
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids])
        with torch.no_grad():
            logits = lm(input_ids=ids[None]).logits[0, -len(ids) :]
        rows = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(-1, rollout.response_ids[:, None])[:, 0])
    return found


# --- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_policy_to_peft_and_to_a_run_that_begins_from_it(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    policy = adapted(tiny_model, kind)
    moved(policy)
    base = {name: p.clone() for name, p in policy.module.named_parameters() if not p.requires_grad}
    save_model(policy.module.lm, policy.tokenizer, tmp_path, base_changed=False)
    expected = scored(policy)
    assert differ(expected, plain_logprobs(plain(tiny_model))) > 0.05

    assert_close(peft_logprobs(policy.module.lm), expected)
    assert_close(peft_logprobs(PeftModel.from_pretrained(plain(tiny_model), tmp_path)), expected)
    again = policy_of(tiny_model, adapter={**KINDS[kind], "path": str(tmp_path)})
    assert differ(scored(again), expected) == 0
    assert trained_share(again.module.lm) == trained_share(policy.module.lm)
    assert all(torch.equal(p, base[n]) for n, p in policy.module.named_parameters() if n in base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sampler_has_the_trainers_log_probs_whatever_the_padding(tiny_model: Path, kind: str) -> None:
    policy = adapted(tiny_model, kind)
    moved(policy)
    engine = HFEngine(
        policy.module.lm,
        eos_token_ids=policy.module.eos_token_ids,
        batch_size=8,
        device=CPU,
        autocast=lambda: policy.module.autocast(CPU),
    )
    requests = [Request(tuple(range(2, 2 + length)), seed) for seed, length in enumerate((1, 9, 4, 6, 12))]
    answers = engine.generate(requests, Sampling(max_tokens=10))
    rollouts = [
        Rollout(torch.tensor(r.prompt_ids), a.response_ids, a.sampler_logprobs, 0, a.finish_reason, r.seed, "")
        for r, a in zip(requests, answers, strict=True)
    ]
    of_trainer = [s.logprobs for s in policy.score(rollouts, tokens_per_microbatch=100)]
    assert_close([r.sampler_logprobs for r in rollouts], of_trainer, atol=2e-5)
    alone = [engine.generate([request], Sampling(max_tokens=10))[0] for request in requests]
    for one, other in zip(alone, answers, strict=True):
        assert torch.equal(one.response_ids, other.response_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_an_anchor_is_the_policy_that_it_was_taken_from(tiny_model: Path, kind: str) -> None:
    policy = adapted(tiny_model, kind)
    first, at_first = policy.snapshot(), scored(policy)
    moved(policy, seed=1)
    anchor, then = policy.snapshot(), scored(policy)
    assert anchor.keys() == {n for n, p in policy.module.named_parameters() if p.requires_grad}
    moved(policy, seed=2)
    before = bits(policy.module)
    assert differ(scored(policy, anchor=anchor), then) == 0
    assert differ(scored(policy, anchor=first), at_first) == 0
    assert differ(scored(policy), then) > 0.05
    if kind in ("lora", "ia3", "layers"):
        assert_close(at_first, plain_logprobs(plain(tiny_model)))
    ids, mask = token_tensors(ROLLOUTS)
    states = policy.anchor_states(batch_of(ids, mask), anchor)
    policy.module.load_state_dict({**policy.module.state_dict(), **anchor})
    torch.testing.assert_close(policy.module.states(ids, mask).hidden, states.hidden)
    policy.module.load_state_dict(before)
    assert_unchanged(policy.module, before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prefix"])
def test_gradients_with_checkpointing_are_those_without(tiny_model: Path, kind: str) -> None:
    ids, mask = token_tensors(ROLLOUTS)
    found: list[dict[str, Tensor | None]] = []
    state = None
    for on in (False, True):
        policy = adapted(tiny_model, kind, model={"path": str(tiny_model), "gradient_checkpointing": on})
        state = state or bits(policy.module)
        policy.module.load_state_dict(state)
        moved(policy)
        policy.module.train()
        policy.module(ids, mask, 1.0).logprobs.sum().backward()
        found.append({n: p.grad for n, p in policy.module.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_float32_under_a_bfloat16_base(tiny_model: Path, kind: str) -> None:
    policy = adapted(tiny_model, kind, model={"path": str(tiny_model), "dtype": "bfloat16"})
    for name, parameter in policy.module.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    exact = adapted(tiny_model, kind)
    if kind in ("lora", "ia3", "layers"):
        assert 1e-4 < differ(scored(policy), scored(exact)) < 0.5
    ids, mask = token_tensors(ROLLOUTS)
    policy.module.train()
    policy.module(ids, mask, 1.0).logprobs.sum().backward()
    gradients = [p.grad for p in policy.module.parameters() if p.requires_grad]
    assert any(g is not None and g.abs().max() > 0 for g in gradients)


def test_virtual_tokens_begin_quietly(tiny_model: Path) -> None:
    prefix = adapted(tiny_model, "prefix").module.lm.prompt_encoder["policy_adapter"].embedding.weight
    assert torch.equal(prefix, torch.zeros_like(prefix))
    many = {"type": "prompt", "tokens": 256}
    lm = policy_of(tiny_model, adapter=many).module.lm
    drawn, embeddings = lm.prompt_encoder["policy_adapter"].embedding.weight, lm.get_input_embeddings().weight
    assert drawn.std().item() == pytest.approx(embeddings.std().item(), rel=0.05)
    lm = policy_of(tiny_model, adapter={**many, "init": "vocabulary"}).module.lm
    for row in lm.prompt_encoder["policy_adapter"].embedding.weight[:8]:
        assert (row == embeddings).all(-1).any()


# --- layers -------------------------------------------------------------------------------------------------------


def test_layers_names_what_it_trains(tiny_untied_model: Path) -> None:
    lm = plain(tiny_untied_model)
    last = trained_layers(lm, LayersAdapter(last_blocks=1))
    assert all(last.values())
    assert {name.removeprefix("model.layers.1.") for name in last} == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        "input_layernorm",
        "post_attention_layernorm",
    }
    norms = trained_layers(lm, LayersAdapter(last_blocks=0, norms=True))
    assert set(norms) == {
        "model.norm",
        *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")),
    }
    biases = trained_layers(lm, LayersAdapter(last_blocks=1, biases=True))
    assert [name for name, whole in biases.items() if not whole] == [
        f"model.layers.0.self_attn.{n}_proj" for n in "qkv"
    ]
    assert trained_layers(lm, LayersAdapter(last_blocks=0, head=True)) == {"lm_head": True}
    with pytest.raises(ValueError, match=r"last_blocks 3: the model has 2 blocks"):
        trained_layers(lm, LayersAdapter(last_blocks=3))


def test_of_a_bias_nothing_else_is_trained_or_copied(tiny_model: Path) -> None:
    policy = policy_of(tiny_model, adapter={"type": "layers", "last_blocks": 0, "biases": True})
    trained = {n: p for n, p in policy.module.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"bias"}
    # Two layers, q of 64 and k, v of 32 each.
    assert sum(p.numel() for p in trained.values()) == trained_share(policy.module.lm).trained == 2 * (64 + 32 + 32)
    layer = policy.module.lm.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.ln_tuning_layers["policy_adapter"].weight is layer.base_layer.weight


def test_a_trained_head_makes_the_log_probs_and_a_tied_one_is_refused(
    tiny_model: Path, tiny_untied_model: Path, tmp_path: Path
) -> None:
    policy = policy_of(tiny_untied_model, adapter=HEAD)
    reference = policy.snapshot()
    moved(policy)
    expected = peft_logprobs(policy.module.lm)
    assert_close(scored(policy), expected)
    assert differ(expected, plain_logprobs(plain(tiny_untied_model))) > 0.05
    assert_close(scored(policy, anchor=reference), plain_logprobs(plain(tiny_untied_model)))
    save_model(policy.module.lm, policy.tokenizer, tmp_path, base_changed=False)
    assert_close(peft_logprobs(PeftModel.from_pretrained(plain(tiny_untied_model), tmp_path)), expected)
    with safe_open(str(tmp_path / "adapter_model.safetensors"), "pt") as saved:
        assert list(saved.keys()) == ["base_model.model.lm_head.ln_tuning_layers.weight"]
    with pytest.raises(ValueError, match=r"output head is its embedding.*set adapter\.head to false"):
        policy_of(tiny_model, adapter=HEAD)


# --- weights for the engines, and folded in -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOLDED)
def test_checkpoint_weights_are_the_policy_and_leave_it_alone(tiny_untied_model: Path, kind: str) -> None:
    policy = adapted(tiny_untied_model, kind)
    moved(policy)
    expected, before = scored(policy), bits(policy.module)
    weights = dict(checkpoint_weights(policy.module.lm))
    base = plain(tiny_untied_model)
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in base.state_dict().items()}
    assert_unchanged(policy.module, before)
    base.load_state_dict(weights)
    assert_close(plain_logprobs(base), expected, MERGED)


def test_folding_an_ia3_in_keeps_the_policy_and_starts_a_fresh_one(tiny_model: Path) -> None:
    policy = adapted(tiny_model, "ia3")
    moved(policy, scale=0.1)
    before = scored(policy)
    merge_adapter(policy.module.lm)
    assert_close(scored(policy), before, MERGED)
    assert all((p == 1).all() for n, p in policy.module.named_parameters() if p.requires_grad)
    moved(policy, scale=0.1)
    assert differ(scored(policy), before) > 0.05


# --- saved adapters -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Any:
    def save(kind: str, folder: str = "adapter") -> tuple[Policy, Path]:
        policy = adapted(tiny_model, kind)
        moved(policy)
        save_model(policy.module.lm, policy.tokenizer, tmp_path / folder, base_changed=False)
        return policy, tmp_path / folder

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_evaluated_as_the_policy_that_it_was(tiny_model: Path, saved: Any, kind: str) -> None:
    policy, folder = saved(kind)
    lm = with_saved_adapter(plain(tiny_model), folder)
    assert isinstance(lm, PeftModel) == (kind in VIRTUAL)
    requests = [Request((3, 4, 5), 1), Request((3, 4, 5, 6, 7, 8), 2)]

    def answers(lm: Any) -> list[Tensor]:
        engine = HFEngine(lm, eos_token_ids=[1], batch_size=2, device=CPU, autocast=lambda: policy.module.autocast(CPU))
        return [answer.sampler_logprobs for answer in engine.generate(requests, Sampling(max_tokens=8))]

    assert_close(answers(lm), answers(policy.module.lm), MERGED)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "ia3", "layers"])
def test_an_adapter_of_another_shape_or_without_its_weights_is_refused(tiny_model: Path, saved: Any, kind: str) -> None:
    _, folder = saved(kind)
    weights = load_file(folder / "adapter_model.safetensors")
    first = sorted(weights)[0]
    for change, why in (
        ({**weights, first: weights[first][..., :1].contiguous()}, "size mismatch|does not fit"),
        ({"other": torch.zeros(1)}, "does not fit"),
        ({}, "holds no weights"),
    ):
        save_file(change, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=why):
            with_saved_adapter(plain(tiny_model), folder)
        with pytest.raises(ValueError, match=rf"adapter\.path.*({why})"):
            policy_of(tiny_model, adapter={**KINDS[kind], "path": str(folder)})


def test_no_tokenizer_or_model_that_an_adapter_names_is_loaded(
    tiny_model: Path, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, folder = saved("prompt")
    path = folder / "adapter_config.json"
    named = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "someone/else"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **named, "num_layers": 7, "token_dim": 3}))
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: pytest.fail(f"loaded {args}"))
    lm = with_saved_adapter(plain(tiny_model), folder)
    assert torch.equal(lm.get_prompt(1), policy.module.lm.get_prompt(1))
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "P_TUNING"}))
    with pytest.raises(ValueError, match="P_TUNING adapter"):
        with_saved_adapter(plain(tiny_model), folder)


def test_an_empty_save_is_noticed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapted(tiny_model, "lora")
    monkeypatch.setattr("peft.peft_model.get_peft_model_state_dict", lambda *args, **kwargs: {})
    with pytest.raises(AssertionError, match="PEFT saved 0 numbers"):
        save_model(policy.module.lm, policy.tokenizer, tmp_path, base_changed=False)


STARTS = [
    ("lora", {"rank": 8}, r"its r is 4, but the recipe asks for 8 \(adapter\.rank\)"),
    ("lora", {"alpha": 9}, r"its lora_alpha is 8"),
    ("lora", {"rslora": True}, "use_rslora is False"),
    ("lora", {"targets": ["q_proj"]}, "one side only"),
    ("prefix", {"tokens": 6}, "num_virtual_tokens is 5"),
    ("prompt", {"tokens": 6}, "num_virtual_tokens is 5"),
    ("ia3", {"feedforward": []}, "feedforward_modules is"),
    ("layers", {"norms": False}, "one side only"),
]


@pytest.mark.parametrize(("kind", "change", "why"), STARTS)
def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(
    tiny_model: Path, saved: Any, tmp_path: Path, kind: str, change: dict[str, Any], why: str
) -> None:
    from remix.train import run

    _, folder = saved(kind)
    recipe = tiny_recipe(tiny_model, tmp_path / "run", {"adapter": {**KINDS[kind], **change, "path": str(folder)}})
    with pytest.raises(ValueError, match=rf"adapter\.path.*{why}"):
        run(recipe)
    assert not (tmp_path / "run").exists()


def test_a_start_of_another_kind_or_base_or_nowhere_is_refused(
    tiny_model: Path, tiny_untied_model: Path, saved: Any, tmp_path: Path
) -> None:
    from remix.training.plan import make_plan

    _, folder = saved("lora")

    def plan(model: Path, adapter: dict[str, Any]) -> None:
        make_plan(tiny_recipe(model, tmp_path / "run", {"adapter": {**adapter, "path": str(folder)}}))

    plan(tiny_model, KINDS["lora"])
    with pytest.raises(ValueError, match="peft_type is 'LORA', but the recipe asks for 'IA3'"):
        plan(tiny_model, KINDS["ia3"])
    with pytest.raises(ValueError, match=r"trained on another base.*give model\.path"):
        plan(tiny_untied_model, KINDS["lora"])
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter\.path.*no adapter_model.safetensors"):
        plan(tiny_model, KINDS["lora"])
    folder = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="no such directory"):
        plan(tiny_model, KINDS["lora"])


def test_recipes_that_contradict_themselves(tiny_model: Path, tmp_path: Path) -> None:
    def refused(why: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=why):
            tiny_recipe(tiny_model, tmp_path, changes)

    swap = {"rollout": {"engine": {"type": "vllm", "lora": "hot_swap"}}}
    merge = {"reincarnation": {"lora": "merge"}}
    for kind in VIRTUAL:
        refused(
            f"vllm does not serve adapter.type {kind}.*hf", adapter=KINDS[kind], rollout={"engine": {"type": "vllm"}}
        )
        refused(r"is no part of any weight|are no part of any weight", adapter=KINDS[kind], **merge)
    refused("layers are weights themselves", adapter=KINDS["layers"], **merge)
    refused("gradient_checkpointing", adapter=KINDS["prefix"], model={"gradient_checkpointing": True})
    for kind in ("ia3", "layers"):
        refused(f"hot_swap.*adapter.type {kind} is not: set it to merged", adapter=KINDS[kind], **swap)
    refused("DoRA", adapter=KINDS["dora"], **swap)
    refused("reincarnation.lora merge is not", adapter=KINDS["lora"], **swap, **merge)
    refused("up to rank 512", adapter={"type": "lora", "rank": 513}, **swap)
    refused("nothing is left to train", adapter={"type": "layers", "last_blocks": 0})
    refused("'up_proj' is none of the targets", adapter={"type": "ia3", "feedforward": ["up_proj"]})
