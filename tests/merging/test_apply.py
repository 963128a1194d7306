"""Merges by the real command, against transformers and PEFT."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from remix import cli
from remix.merging import apply
from remix.models import files
from tests.merging.making import (
    assert_close,
    assert_identical,
    lora,
    make_adapter,
    make_model,
    merged_by_peft,
    remix_merge,
    state_of,
    stored,
)
from tests.tiny import ROOT

KINDS: dict[str, Any] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(target_modules="all-linear", rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3},
                     alpha_pattern={"layers.0.self_attn.q_proj": 11, "k_proj": 3}),
    "dora": lora(use_dora=True),
    "head": lora(modules_to_save=["lm_head", "input_layernorm"]),
    "embedding": lora(target_modules=["embed_tokens", "v_proj", "lm_head"]),
    "bias": lora(bias="lora_only"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tiny_untied_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        name: make_adapter(tiny_untied_model, folder / name, config, seed=index)
        for index, (name, config) in enumerate(KINDS.items())
    }
    wide = lora(r=7, lora_alpha=3, target_modules=["q_proj", "o_proj", "gate_proj"])
    return made | {
        "wide": make_adapter(tiny_untied_model, folder / "wide", wide, seed=20),
        "second": make_adapter(tiny_untied_model, folder / "second", lora(lora_alpha=9), seed=21),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_at_weight_1_is_what_peft_merges(
    kind: str, adapters: dict[str, Path], tiny_untied_model: Path, tmp_path: Path
) -> None:
    assert remix_merge(tmp_path / "out", tiny_untied_model, "task_arithmetic", [adapters[kind]]) == 0
    expected = merged_by_peft(tiny_untied_model, adapters[kind])
    before = state_of(tiny_untied_model)
    assert sum(not expected[name].equal(before[name]) for name in before) >= 3
    assert_close(state_of(tmp_path / "out"), expected)


SETTINGS = [
    ("task_arithmetic", []), ("ties", ["--density", "0.4"]), ("dare_ties", ["--density", "0.5"]), ("magmax", []),
    ("consensus", ["--param", "k=1"]), ("pam", []),
]  # fmt: skip
"""Methods whose weights scale task vectors."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "options"), SETTINGS)
def test_weight_0_leaves_the_base_to_the_bit(
    method: str,
    options: list[str],
    dtype: torch.dtype,
    adapters: dict[str, Path],
    tiny_untied_model: Path,
    tmp_path: Path,
) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_untied_model, dtype=dtype)
    lm.model.layers[0].self_attn.q_proj.weight.data[0, :9] = -0.0
    base = tmp_path / tiny_untied_model.name
    lm.save_pretrained(base)
    parents = [adapters["lora"], adapters["head"]]
    for form in ("delta", "factors"):
        own = [*options, "--weights", "0", "0", "--lora-form", form]
        assert remix_merge(tmp_path / form, base, method, unbound(parents, tmp_path / f"for_{form}"), *own) == 0
        assert_identical(stored(tmp_path / form), stored(base))


def unbound(adapters: list[Path], folder: Path) -> list[Path]:
    """Copies that do not say what they were trained on."""
    for adapter in adapters:
        (folder / adapter.name).mkdir(parents=True)
        (folder / adapter.name / "adapter_model.safetensors").symlink_to(adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (folder / adapter.name / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": None})
        )
    return [folder / adapter.name for adapter in adapters]


def test_different_ranks_targets_and_variants_add_up(
    adapters: dict[str, Path], tiny_untied_model: Path, tmp_path: Path
) -> None:
    """θ_0 + Σ w_i (θ_i − θ_0), with each θ_i by PEFT; where one parent has no layer, the others stand alone."""
    names, weights = ["wide", "dora", "head"], [0.5, -1.5, 0.25]
    options = ["--weights", *map(str, weights)]
    assert (
        remix_merge(tmp_path / "out", tiny_untied_model, "task_arithmetic", [adapters[n] for n in names], *options) == 0
    )
    base = state_of(tiny_untied_model)
    expected = {name: tensor.clone() for name, tensor in base.items()}
    for parent, weight in zip(names, weights, strict=True):
        for name, tensor in merged_by_peft(tiny_untied_model, adapters[parent]).items():
            expected[name] += weight * (tensor - base[name])
    assert_close(state_of(tmp_path / "out"), expected, atol=4e-6)
    assert expected["model.layers.0.self_attn.o_proj.weight"].ne(base["model.layers.0.self_attn.o_proj.weight"]).any()


@pytest.mark.parametrize(
    ("method", "options"), [*SETTINGS[:4], ("linear", []), ("karcher", []), ("tall", ["--param", "task=1"])]
)
def test_the_order_of_parents_changes_no_bit(
    method: str, options: list[str], adapters: dict[str, Path], tiny_untied_model: Path, tmp_path: Path
) -> None:
    parents = [adapters[name] for name in ("lora", "wide", "second")]
    weights = ["0.7", "0.2", "0.5"]
    assert remix_merge(tmp_path / "one", tiny_untied_model, method, parents, "--weights", *weights, *options) == 0
    parents, weights = [parents[i] for i in (2, 0, 1)], [weights[i] for i in (2, 0, 1)]
    if method == "tall":
        options = ["--param", "task=2"]  # the same parent in its new place
    assert remix_merge(tmp_path / "two", tiny_untied_model, method, parents, "--weights", *weights, *options) == 0
    assert_identical(stored(tmp_path / "one"), stored(tmp_path / "two"))
    assert any(not a.equal(b) for a, b in zip(stored(tmp_path / "one").values(), stored(tiny_untied_model).values(),
                                              strict=True))  # fmt: skip


def test_draws_depend_on_the_seed(adapters: dict[str, Path], tiny_untied_model: Path, tmp_path: Path) -> None:
    for out, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        options = ["--density", "0.5", "--seed", seed]
        assert remix_merge(tmp_path / out, tiny_untied_model, "dare_linear", [adapters["lora"]], *options) == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_identical(stored(tmp_path / "one"), stored(tmp_path / "again"))
    assert not stored(tmp_path / "one")[name].equal(stored(tmp_path / "two")[name])


# --- adapters as output -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "theirs", "options"),
    [("task_arithmetic", "linear", []), ("ties", "ties", ["--density", "0.5"]),
     ("task_arithmetic", "magnitude_prune", ["--density", "0.5"])],
)  # fmt: skip
def test_merged_factors_are_those_of_peft(
    method: str, theirs: str, options: list[str], adapters: dict[str, Path], tiny_untied_model: Path, tmp_path: Path
) -> None:
    """add_weighted_adapter, and both written into the weights; one weight below 0, two scalings."""
    lm = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_untied_model, dtype=torch.float32), adapters["lora"], "first"
    )
    lm.load_adapter(adapters["second"], "second")
    density = float(options[1]) if options else None
    lm.add_weighted_adapter(["first", "second"], [0.8, -0.3], "both", theirs, density=density)
    lm.set_adapter("both")
    expected = lm.merge_and_unload(adapter_names=["both"]).state_dict()

    parents = [adapters["lora"], adapters["second"]]
    options = [*options, "--weights", "0.8", "-0.3", "--lora-form", "factors"]
    assert remix_merge(tmp_path / "model", tiny_untied_model, method, parents, *options) == 0
    assert remix_merge(tmp_path / "adapter", tiny_untied_model, method, parents, *options, "--as", "adapter") == 0
    assert_close(state_of(tmp_path / "model"), expected)
    assert_close(state_of(tiny_untied_model, tmp_path / "adapter"), expected)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_factors_of_one_adapter_stay_as_they_are(
    adapters: dict[str, Path], tiny_untied_model: Path, tmp_path: Path
) -> None:
    options = ["--lora-form", "factors", "--as", "adapter"]
    assert remix_merge(tmp_path / "out", tiny_untied_model, "task_arithmetic", [adapters["lora"]], *options) == 0
    assert_identical(
        load_file(tmp_path / "out" / files.ADAPTER_WEIGHTS), load_file(adapters["lora"] / files.ADAPTER_WEIGHTS)
    )


@pytest.mark.parametrize("names", [("lora", "wide"), ("embedding", "head"), ("dora", "second")], ids=" ".join)
def test_deltas_factorised_again(
    names: tuple[str, str],
    adapters: dict[str, Path],
    tiny_untied_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A rank that holds all gives the merged model; a lower one says what it keeps."""
    parents = [adapters[name] for name in names]
    assert remix_merge(tmp_path / "model", tiny_untied_model, "task_arithmetic", parents) == 0
    whole = ["--as", "adapter", "--rank", "64"]
    assert remix_merge(tmp_path / "whole", tiny_untied_model, "task_arithmetic", parents, *whole) == 0
    assert_close(state_of(tiny_untied_model, tmp_path / "whole"), state_of(tmp_path / "model"), atol=5e-6)
    capsys.readouterr()
    assert (
        remix_merge(tmp_path / "low", tiny_untied_model, "task_arithmetic", parents, "--as", "adapter", "--rank", "3")
        == 0
    )
    kept = json.loads((tmp_path / "low" / "merge.json").read_text())["energy_kept"]
    name = "model.layers.0.self_attn.q_proj.weight" if "embedding" not in names else "lm_head.weight"
    delta = stored(tmp_path / "model")[name] - stored(tiny_untied_model)[name]
    energies = torch.linalg.svdvals(delta.double()).square()
    assert kept[name] == pytest.approx(float(energies[:3].sum() / energies.sum()), abs=1e-5)
    assert min(kept.values()) < 0.999
    shown = f"energy kept {min(kept.values()):.4f} at least, {sum(kept.values()) / len(kept):.4f} in the mean"
    assert shown in capsys.readouterr().out
    assert f"{min(kept.values()):.4f} at least" in (tmp_path / "low" / "README.md").read_text()


# --- whole models, shards, dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_in_shards(dtype: torch.dtype, tiny_model: Path, tmp_path: Path) -> None:
    base, *parents = [
        make_model(tiny_model, tmp_path / name, seed=seed, dtype=dtype, max_shard_size="60KB")
        for seed, name in enumerate(("base", "one", "two"))
    ]
    assert len(list(base.glob("*.safetensors"))) > 2
    options = ["--weights", "0.5", "0.25", "--shard-size", "0.00004"]
    assert remix_merge(tmp_path / "out", base, "task_arithmetic", parents, *options, kind="--models") == 0
    found, index = stored(tmp_path / "out"), json.loads((tmp_path / "out" / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert len(set(index["weight_map"].values())) > 2
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 40_000
    before, one, two = stored(base), stored(parents[0]), stored(parents[1])
    expected = {
        name: (t.float() + 0.5 * (one[name].float() - t.float()) + 0.25 * (two[name].float() - t.float())).to(dtype)
        for name, t in before.items()
    }
    assert "lm_head.weight" not in found  # tied, and stays so
    assert_close(found, expected, atol=1e-6 if dtype == torch.float32 else 0.008)
    assert state_of(tmp_path / "out")["lm_head.weight"].equal(state_of(tmp_path / "out")["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", []), ("task_arithmetic", []), ("magmax", []), ("tall", ["--param", "task=1"]), ("consensus", []),
     ("task_arithmetic", ["--density", "0.5"]), ("ties", []), ("dare_linear", [])],
)  # fmt: skip
def test_tensors_merged_in_parts_are_those_merged_at_once(
    method: str, options: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = [make_model(tiny_model, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    options = [*options, "--weights", "0.6", "0.9"]
    assert remix_merge(tmp_path / "whole", tiny_model, method, parents, *options, kind="--models") == 0
    monkeypatch.setattr(apply, "BLOCK", 2000)
    assert remix_merge(tmp_path / "parts", tiny_model, method, parents, *options, kind="--models") == 0
    assert_identical(stored(tmp_path / "whole"), stored(tmp_path / "parts"))


def test_another_dtype_and_what_lay_beside_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    beside = {"preprocessor_config.json": "{}", "chat_template.jinja": "{{ messages }}", "merge_notes.txt": "x"}
    for name, text in beside.items():
        (base / name).write_text(text)
    one = make_model(base, tmp_path / "one", seed=1)
    assert remix_merge(tmp_path / "out", base, "linear", [one], "--dtype", "bfloat16", kind="--models") == 0
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    for path in base.glob("*"):
        if path.suffix != ".safetensors" and path.name != "config.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    expected = {name: tensor.bfloat16() for name, tensor in stored(one).items()}
    assert_identical(stored(tmp_path / "out"), expected)


def test_tensors_may_have_weights_of_their_own(
    adapters: dict[str, Path], tiny_untied_model: Path, tmp_path: Path
) -> None:
    """The last match that sets a key decides it."""
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"""
base: {tiny_untied_model}
adapters: [{adapters["lora"]}, {adapters["second"]}]
method: task_arithmetic
weights: [1, 1]
overrides:
  - {{match: "*.layers.1.*", weights: [0, 0.5]}}
  - {{match: "*.mlp.*", params: {{density: 0.0}}}}
  - {{match: "*.layers.1.self_attn.*", weights: [2, 0]}}
""")
    assert cli.main(["merge", "--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 0
    base = stored(tiny_untied_model)
    first, second = (merged_by_peft(tiny_untied_model, adapters[name]) for name in ("lora", "second"))
    found = stored(tmp_path / "out")
    for name, weights in {
        "model.layers.0.self_attn.q_proj.weight": (1, 1),
        "model.layers.0.mlp.down_proj.weight": (0, 0),
        "model.layers.1.mlp.down_proj.weight": (0, 0),
        "model.layers.1.self_attn.q_proj.weight": (2, 0),
    }.items():
        expected = base[name] + sum(w * (p[name] - base[name]) for w, p in zip(weights, (first, second), strict=True))
        torch.testing.assert_close(found[name], expected, atol=2e-6, rtol=0)


PEAK = """
import re, sys
from pathlib import Path
from remix import cli
def peak():  # of this program: rusage counts what forked it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
import torch, transformers, remix.merging.run
torch.zeros(1)
before = peak()
assert cli.main(sys.argv[1:]) == 0
print("grown by", peak() - before)
"""


def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    """180 MB in 12 shards, merged from two parents: the process grows by a few shards and tensors, not by a model."""
    config = Qwen2Config(vocab_size=64, hidden_size=1024, intermediate_size=1024, num_hidden_layers=6,
                         num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        lm = Qwen2ForCausalLM(config)
    lm.to_empty(device="cpu")
    lm.tie_weights()
    paths = [tmp_path / name for name in ("base", "one", "two")]
    for index, path in enumerate(paths):
        for parameter in lm.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape).mul_(index + 1)
        lm.save_pretrained(path, max_shard_size="16MB")
    size = sum(parameter.nbytes for parameter in lm.parameters()) / 1e6
    assert size > 170
    words = ["merge", "--base", paths[0], "--models", *paths[1:], "--method", "linear",
             "--shard-size", "0.016", "--out", tmp_path / "out"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.rsplit("grown by ", 1)[1])
    print(f"model {size:.0f} MB, grown by {grown} MB")
    assert grown < 80  # base, two parents and the result of one tensor are 17 MB, a shard 16
