"""Exports are what was trained: adapters merged and saved, checkpoints, weights out and in again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from remix.config import LoraAdapter
from remix.models.adapters import ADAPTER, add_adapter, checkpoint_weights, merge_adapter, save_model
from tests.models.policies import (
    LORAS,
    MERGED,
    assert_close,
    assert_unchanged,
    bits,
    differ,
    moved,
    plain,
    plain_logprobs,
    policy_of,
    scored,
)

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
