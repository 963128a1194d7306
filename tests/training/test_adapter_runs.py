"""Runs with every kind of adapter: by GRPO, PPO and ReMix, resumed, reincarnated, on every engine that serves it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from remix import cli
from remix.errors import TrainingError
from remix.models.adapters import adapter_weights, engine_weights, trained_share
from remix.training.memory import estimate_memory
from remix.training.plan import make_plan
from remix.training.plan_view import render
from remix.training.probe import SyncProbe
from tests.models.policies import assert_close, plain_logprobs, scored
from tests.tiny import EMBEDDED, KINDS, MIX, opened, run, tiny_recipe, weights_of
from tests.training.test_degenerate import metrics_of

GAE = {"type": "gae", "critic": {"type": "shared"}}
SEPARATE = {"type": "gae", "critic": {"type": "separate"}}
KL = {"weight": 0.1, "lambda_schedule": {"start": 0.9, "hold": 1, "every": 1, "drop": 0.2}}
REMIX = {"phases": [{**MIX[0], "until": [{"type": "steps", "after": 2}]}, {"type": "on_policy"}], "kl": KL, "steps": 4}
"""Replay, both anchors, and a reincarnation before the third of four steps."""
VLLM = {"type": "vllm", "kv_cache_gib": 0.06}


def base_bits(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in trainer.policy.module.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "advantage"),
    [
        *product(("lora", "dora", "ia3", "prefix", "prompt", "layers"), ({"type": "grpo"}, GAE)),
        *product(("prefix", "layers"), [SEPARATE]),
    ],
    ids=str,
)
def test_it_trains_and_nothing_else_moves(
    tiny_model: Path, tmp_path: Path, kind: str, advantage: dict[str, Any]
) -> None:
    with opened(tiny_recipe(tiny_model, tmp_path, {"adapter": KINDS[kind], "advantage": advantage, "kl": KL})) as t:
        before, base = weights_of(t), base_bits(t)
        t.fit()
        after = weights_of(t)
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        # A's gradient is zero while B is, so that of two steps only the second moves it.
        assert {n for n in before if n.startswith("lm.")} <= set(moved)
        assert any(not name.startswith("lm.") for name in moved) == (advantage["type"] == "gae")
        now = base_bits(t)
        assert now.keys() == base.keys()
        assert all(torch.equal(base[name], now[name]) for name in base)
    for line in metrics_of(tmp_path):
        assert line["sampler/mismatch_max"] < 5e-5
        assert line["updates"] == 2


@pytest.mark.parametrize("kind", ["ia3", "prefix", "prompt", "layers"])
def test_a_resumed_remix_is_the_run_it_would_have_been(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    changes = {**REMIX, "adapter": KINDS[kind]}
    whole = run(tiny_recipe(tiny_model, tmp_path / "whole", changes))
    run(tiny_recipe(tiny_model, tmp_path / "parts", {**changes, "max_steps": 2}))
    parts = run(tiny_recipe(tiny_model, tmp_path / "parts", changes), resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for name in ("whole", "parts"):
        lines = metrics_of(tmp_path / name)
        assert [line["batch/replayed"] > 0 for line in lines] == [False, True, False, False]
        # The reference is the policy itself where the second phase begins.
        assert 0 < lines[2]["kl/reference"] < lines[1]["kl/reference"]
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert (result["reincarnations"], result["adapter"]) == ([2], KINDS[kind]["type"])
        assert 0 < result["trained_share"] < 1
    for step in range(4):
        shards = [pq.read_table(tmp_path / n / "rollouts" / f"step={step:06d}.parquet") for n in ("whole", "parts")]
        assert shards[0].equals(shards[1])
    files = [(tmp_path / n / "final" / "adapter_model.safetensors").read_bytes() for n in ("whole", "parts")]
    assert files[0] == files[1]
    with opened(tiny_recipe(tiny_model, tmp_path / "whole", changes), resume=True) as t:
        lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "whole" / "final")
        if KINDS[kind]["type"] not in ("prefix", "prompt"):  # of whose logits the first are of virtual tokens
            assert_close(plain_logprobs(lm), scored(t.policy), 5e-5)
        else:
            assert torch.equal(
                lm.prompt_encoder.default.embedding.weight,
                t.policy.module.lm.get_prompt_embedding_to_save("policy_adapter"),
            )


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_the_exact_kl_to_both_anchors(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    run(tiny_recipe(tiny_model, tmp_path, {**REMIX, "kl": {**KL, "estimator": "full"}, "adapter": KINDS[kind]}))
    lines = metrics_of(tmp_path)
    assert lines[1]["loss/kl"] > 0


def test_an_ia3_is_folded_in_where_it_reincarnates(tiny_model: Path, tmp_path: Path) -> None:
    changes = {**REMIX, "adapter": KINDS["ia3"], "reincarnation": {"lora": "merge"}}
    run(tiny_recipe(tiny_model, tmp_path / "whole", changes))
    assert not (tmp_path / "whole" / "final" / "adapter_config.json").exists()
    with opened(tiny_recipe(tiny_model, tmp_path / "whole", changes), resume=True) as t:
        final = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final")
        assert_close(plain_logprobs(final), scored(t.policy), 5e-5)


# --- beginning from a saved adapter -------------------------------------------------------------------------------


def test_a_run_goes_on_from_a_saved_adapter(tiny_model: Path, tmp_path: Path) -> None:
    kind = "lora"
    short = {"eval": {"prompts": 1}, "adapter": KINDS[kind]}
    begun = run(tiny_recipe(tiny_model, tmp_path / "first", {**short, "optimizer": {"lr": 0.02}}))
    start = tmp_path / "first" / "final"

    def further(run_dir: str, path: Path, **changes: Any) -> Any:
        adapter = {**KINDS[kind], "path": str(path)}
        return tiny_recipe(tiny_model, tmp_path / run_dir, {**short, "kl": KL, "adapter": adapter, **changes})

    with opened(further("whole", start)) as t:
        # Its weights and its reference are the adapter's, not the base model's.
        assert all(torch.equal(begun[name], tensor) for name, tensor in weights_of(t).items())
        assert all(torch.equal(begun[name], tensor) for name, tensor in t.policy.reference.items())
        t.fit()
        whole = weights_of(t)
    run(further("parts", start, max_steps=1))
    # The folder may have moved, and its weights may be others by now.
    moved = start.rename(tmp_path / "elsewhere")
    weights = {name: tensor + 1 for name, tensor in load_file(moved / "adapter_model.safetensors").items()}
    save_file(weights, moved / "adapter_model.safetensors")
    resumed = run(further("parts", moved), resume=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


# --- vLLM ---------------------------------------------------------------------------------------------------------


def swapped(model: Path, run_dir: Path, **engine: Any) -> Any:
    changes = {**REMIX, "adapter": {**KINDS["rslora"], "dropout": 0.1}}
    return tiny_recipe(model, run_dir, {**changes, "rollout": {"engine": {**VLLM, "lora": "hot_swap", **engine}}})


@pytest.mark.parametrize("kind", ["ia3", "layers"])
def test_vllm_has_the_merged_weights(vllm_model: Path, tmp_path: Path, kind: str) -> None:
    run(tiny_recipe(vllm_model, tmp_path, {"adapter": KINDS[kind], "rollout": {"engine": VLLM}}))
    for line in metrics_of(tmp_path):
        assert line["sampler/probe"] < 1e-4
        assert line["sampler/mismatch_max"] < 1e-3


def test_a_lora_is_swapped_into_vllm_in_this_process_or_its_own(vllm_model: Path, tmp_path: Path) -> None:
    here = run(swapped(vllm_model, tmp_path / "here"))
    for line in metrics_of(tmp_path / "here"):
        assert line["sampler/probe"] < 1e-5
        assert line["sampler/mismatch_max"] < 1e-4
    there = run(swapped(vllm_model, tmp_path / "there", own_process=True))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_lora_that_is_not_taken_over_is_caught(vllm_model: Path, tmp_path: Path) -> None:
    recipe = swapped(vllm_model, tmp_path)
    recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": 1e-6})})
    with opened(recipe) as t:
        sync = t.sampler.engine.sync
        sync(engine_weights(t.policy.module.lm, recipe.rollout.engine))
        t.sampler.engine.sync, t.probe = lambda weights: None, SyncProbe(recipe, t.policy)
        with pytest.raises(TrainingError, match="sync changed nothing in the vllm engine"):
            t.fit()
        t.sampler.engine.sync = sync
        prompts = t.stream.take(0, 4)
        sync(engine_weights(t.policy.module.lm, recipe.rollout.engine))
        assert t.probe._takes_weights(t.sampler.engine, prompts, t.probe._ask(t.sampler.engine, prompts))
        with pytest.raises(ValueError, match="lora"):
            sync((name.replace("q_proj", "z_proj"), tensor) for name, tensor in adapter_weights(t.policy.module.lm))


# --- plan and evaluation ------------------------------------------------------------------------------------------

WORDS = {
    "lora": ("LoRA, rank 4", "all weights after each step, the adapter merged into them"),
    "dora": ("DoRA, rank 4", "all weights after each step, the adapter merged into them"),
    "ia3": ("(IA)³ on k_proj, v_proj, down_proj", "all weights after each step, the adapter merged into them"),
    "prefix": ("a prefix of 5 tokens", "the trainer's own module"),
    "prompt": ("a prompt of 5 tokens", "the trainer's own module"),
    "layers": ("the last block, norms, biases", "all weights after each step, the adapter merged into them"),
}


@pytest.mark.parametrize("kind", WORDS)
def test_the_plan_tells_the_share_and_the_engines_way(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    engine = {} if kind in ("prefix", "prompt") else {"rollout": {"engine": VLLM}}
    recipe = tiny_recipe(tiny_model, tmp_path, {"adapter": KINDS[kind], **engine})
    plan = make_plan(recipe)
    assert (plan.adapter, plan.engine_way) == WORDS[kind]
    recipe = tiny_recipe(tiny_model, tmp_path, {"adapter": KINDS[kind]})
    with opened(recipe) as t:
        share = trained_share(t.policy.module.lm)
    memory = estimate_memory(recipe)
    assert memory.trained == share.trained
    assert memory.share == pytest.approx(share.share)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(plan))
    shown = " ".join(console.export_text().split())
    assert f"({share.share:.3%} of the policy)" in shown
    assert plan.engine_way in shown


def test_the_share_of_other_layers(tiny_untied_model: Path, tmp_path: Path) -> None:
    for change in ({"head": True}, {"last_blocks": 0, "biases": True}, {"last_blocks": 0, "norms": True}):
        recipe = tiny_recipe(tiny_untied_model, tmp_path, {"adapter": {"type": "layers", **change}})
        with opened(recipe) as t:
            assert estimate_memory(recipe).trained == trained_share(t.policy.module.lm).trained
    swap = make_plan(
        tiny_recipe(
            tiny_untied_model, tmp_path, {"adapter": KINDS["lora"], "rollout": {"engine": {**VLLM, "lora": "hot_swap"}}}
        )
    )
    assert swap.engine_way == "the LoRA after each step, beside the base weights"
    with pytest.raises(ValueError, match=r"last_blocks 3: the model has 2 blocks"):
        make_plan(tiny_recipe(tiny_untied_model, tmp_path, {"adapter": {"type": "layers", "last_blocks": 3}}))
    with pytest.raises(ValueError, match=r"adapter\.tokens 300 exceeds the model's 256 positions"):
        make_plan(tiny_recipe(tiny_untied_model, tmp_path, {"adapter": {"type": "prompt", "tokens": 300}}))


@pytest.mark.parametrize("kind", ["prefix", "prompt", "layers", "ia3"])
def test_the_evaluation_is_of_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    base = EMBEDDED / "base"
    task = {"tasks": [{"type": "arithmetic", "size": 64}], "prompt": {"max_tokens": 32}}
    recipe = tiny_recipe(base, tmp_path / "run", {"adapter": KINDS[kind], "optimizer": {"lr": 0.05}, **task})
    run(recipe)
    command = ["eval", "--model", str(base), "--benchmarks", "arithmetic", "--limit", "12", "--max-tokens", "24"]
    adapter = ["--adapter", str(tmp_path / "run" / "final")]
    if kind in ("prefix", "prompt"):
        assert cli.main([*command, *adapter, "--engine", "vllm", "--out", str(tmp_path / "vllm")]) == 2
        assert f"vLLM does not serve {kind} adapters; add --engine hf" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "vllm").exists()
    texts = []
    for name, more in (("base", []), ("adapted", adapter)):
        assert cli.main([*command, *more, "--engine", "hf", "--out", str(tmp_path / name)]) == 0
        (chunk,) = (tmp_path / name / "generations" / "arithmetic").glob("*.parquet")
        texts.append([row["text"] for row in pq.read_table(chunk).to_pylist()])
    assert texts[0] != texts[1]
