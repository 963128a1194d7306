"""What a merge leaves behind: models that load and answer everywhere, a record, a card, a table of scores."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from remix import cli
from remix.merging.apply import Merge
from remix.merging.methods import METHODS
from remix.models.files import fingerprint
from remix.rollout.vllm import VLLMEngine
from remix.types import Request, Sampling
from tests.merging.making import (
    assert_close,
    lora,
    make_adapter,
    make_model,
    merged_by_peft,
    remix_merge,
    state_of,
    stored,
)
from tests.tiny import EMBEDDED

BASE = EMBEDDED / "base"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of the embedded model."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(BASE, folder / name, lora(), seed=seed, by=1.0) for seed, name in enumerate(("sums", "products"))
    ]


# --- what loads it ------------------------------------------------------------------------------------------------


def test_transformers_peft_and_vllm_answer_alike(vllm_model: Path, tmp_path: Path) -> None:
    """The merged model in all three, and the merged adapter on its base in PEFT."""
    parents = [make_adapter(vllm_model, tmp_path / name, lora(), seed=seed, by=2.0) for seed, name in enumerate("ab")]
    options = ["--weights", "0.6", "0.4", "--lora-form", "factors"]
    assert remix_merge(tmp_path / "model", vllm_model, "ties", parents, *options) == 0
    assert remix_merge(tmp_path / "adapter", vllm_model, "ties", parents, *options, "--as", "adapter") == 0
    prompt, length, never = (5, 9, 14, 20), 12, 97  # a token that would end the response

    def greedy(lm: torch.nn.Module) -> list[int]:
        ids = torch.tensor([prompt])
        tokens = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
                             eos_token_id=never)  # fmt: skip
        return tokens[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    base = AutoModelForCausalLM.from_pretrained(vllm_model, dtype=torch.float32)
    before = greedy(base)
    by_transformers = greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    by_peft = greedy(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    engine = VLLMEngine(str(tmp_path / "model"), max_model_len=64, kv_cache_gib=0.06, eos_token_ids=[never])
    try:
        completion = engine.generate([Request(prompt, seed=0)], Sampling(length, temperature=0))[0]
    finally:
        engine.close()
    assert by_transformers == by_peft == completion.response_ids.tolist()
    assert len(set(by_transformers)) > 3
    assert by_transformers != before


def llava(folder: Path, *, tie: bool = False) -> Path:
    text = Qwen2Config(vocab_size=98, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=8)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=5, tie_word_embeddings=tie)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_vision_language_model(tiny_untied_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its checkpoint names its tensors otherwise than its module, and so than its adapters."""
    auto, base = AutoModelForImageTextToText, llava(tmp_path / "base")
    config = lora(target_modules=["q_proj", "fc1", "linear_2", "lm_head"], task_type=None)
    parents = [make_adapter(base, tmp_path / name, config, seed=seed, auto=auto) for seed, name in enumerate("ab")]
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in stored(base)
    assert remix_merge(tmp_path / "out", base, "task_arithmetic", parents, "--weights", "1", "0") == 0
    expected = merged_by_peft(base, parents[0], auto)
    assert_close(state_of(tmp_path / "out", auto=auto), expected)
    assert stored(tmp_path / "out").keys() == stored(base).keys()
    assert remix_merge(tmp_path / "adapter", base, "ties", parents, "--as", "adapter", "--rank", "64") == 0
    assert remix_merge(tmp_path / "model", base, "ties", parents) == 0
    assert_close(state_of(base, tmp_path / "adapter", auto), state_of(tmp_path / "model", auto=auto), atol=5e-6)

    capsys.readouterr()
    of_text = make_adapter(tiny_untied_model, tmp_path / "text", lora(), seed=1)
    config_file = of_text / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"base_model_name_or_path": None}))
    assert remix_merge(tmp_path / "none", base, "linear", [of_text]) == 2
    assert "a LlavaForConditionalGeneration, has no such tensor" in capsys.readouterr().err
    assert remix_merge(tmp_path / "none", base, "linear", [tiny_untied_model], kind="--models") == 2
    assert f"is a Qwen2ForCausalLM, the base {base} a LlavaForConditionalGeneration" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- record and card ----------------------------------------------------------------------------------------------


def test_the_record_and_the_card(adapters: list[Path], tmp_path: Path) -> None:
    options = ["--weights", "0.5", "2", "--density", "0.4", "--param", "mean=sum", "--seed", "7"]
    assert remix_merge(tmp_path / "out", BASE, "dare_ties", adapters, *options) == 0
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == "dare_ties"
    assert record["seed"] == 7
    assert (record["parameters"]["density"], record["parameters"]["mean"]) == (0.4, "sum")
    assert record["base"] == {"path": str(BASE.resolve()), "merge": None,
                              "sha256": fingerprint(BASE, ["*.safetensors"])["sha256"]}  # fmt: skip
    assert [(parent["path"], parent["weight"], parent["kind"]) for parent in record["parents"]] == [
        (str(adapters[0]), 0.5, "LORA"), (str(adapters[1]), 2.0, "LORA"),
    ]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == [str(BASE.resolve())]
    assert front["library_name"] == "transformers"
    assert "dare_ties" in front["tags"]
    assert METHODS["dare_ties"].paper in card
    assert "density 0.4" in card
    for parent in record["parents"]:
        assert fingerprint(Path(parent["path"]), ["adapter_*"])["sha256"] == parent["sha256"]
        assert f"| {parent['weight']:g} | `{parent['sha256']}` |" in card
    # The record alone has the merge again.
    again = ["--weights", *(str(parent["weight"]) for parent in record["parents"]), "--seed", str(record["seed"])]
    again += [word for key, value in record["parameters"].items() for word in ("--param", f"{key}={json.dumps(value)}")]
    parents = [Path(parent["path"]) for parent in record["parents"]]
    assert remix_merge(tmp_path / "again", Path(record["base"]["path"]), record["method"], parents, *again) == 0
    for file in ("model.safetensors", "merge.json", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_the_list_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merge", "--list"]) == 0
    shown = capsys.readouterr().out
    issue = (
        "linear task_arithmetic ties dare_linear dare_ties della magmax slerp karcher model_stock fisher regmean tall"
    )
    for name in [*issue.split(), "consensus", "pam"]:
        assert f"\n{name} " in shown
        for key, parameter in METHODS[name].parameters.items():
            assert f"{key} ({parameter.default}):" in shown


def test_an_interrupted_merge_leaves_nothing(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of it: neither the output, nor what was to become it."""
    tensor, before = Merge.tensor, []

    def interrupted(self: Merge, name: str, statistics: Any = None) -> torch.Tensor:
        if "layers.1" in name:
            before.extend(path.name for path in tmp_path.iterdir())
            signal.raise_signal(signal.SIGINT)
        return tensor(self, name, statistics)

    monkeypatch.setattr(Merge, "tensor", interrupted)
    assert remix_merge(tmp_path / "out", BASE, "linear", adapters) == 130
    assert before == [".out.tmp"]
    assert "interrupted; nothing has been written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_stop_a_merge(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_model(tiny_model, tmp_path / "broken", seed=1)
    tensors = stored(broken)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    AutoModelForCausalLM.from_pretrained(broken).save_pretrained(broken, state_dict=tensors)
    assert remix_merge(tmp_path / "out", tiny_model, "ties", [broken], kind="--models") == 2
    assert (
        "model.layers.1.mlp.up_proj.weight: task vector 0 holds values that are not finite" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


# --- evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suite", "form"), [("arithmetic", "model"), ("arithmetic", "adapter"), ("shapes", "adapter")])
def test_base_parents_and_merged_model_in_one_table(
    suite: str, form: str, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weight 0 is the base again; the parents are as `remix eval` finds them. Of a vision-language model too."""
    out, base = tmp_path / "out", BASE
    if suite == "shapes":
        base, config, auto = EMBEDDED / "shapes_base", lora(task_type=None), AutoModelForImageTextToText
        adapters = [make_adapter(base, tmp_path / adapter.name, config, seed=seed, auto=auto, by=2.0)
                    for seed, adapter in enumerate(adapters)]  # fmt: skip
    options = ["--weights", "0", "0", "--evaluate", suite, "--limit", "24", "--engine", "hf", "--as", form]
    assert remix_merge(out, base, "task_arithmetic", adapters, *options) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())["scores"]
    assert [row["name"] for row in found] == ["base", "1-sums", "2-products", "merged"]
    shares = [row["benchmarks"][suite]["avg@k"] for row in found]
    assert shares[0] == shares[3] > max(shares[1:3])
    card = (out / "README.md").read_text()
    for row, share in zip(found, shares, strict=True):
        assert f"| {row['name']} | {100 * share:.1f} |" in card
        assert any(line.split() == [row["name"], f"{100 * share:.1f}"] for line in shown.splitlines())
    assert sum(1 for _ in (out / "evaluation" / "2-products").glob(f"generations/{suite}/*.parquet")) == 1
    words = ["eval", "--model", str(base), "--adapter", str(adapters[0]), "--benchmarks", suite]
    assert cli.main([*words, "--engine", "hf", "--limit", "24", "--out", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert alone["benchmarks"] == found[1]["benchmarks"]


def test_what_cannot_be_evaluated_is_not_merged(
    tiny_model: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before the merge, not after it."""
    options = ["--engine", "hf", "--limit", "2", "--evaluate"]
    assert remix_merge(tmp_path / "out", BASE, "ties", adapters, *options, "shapes") == 2
    assert "a text model, and the task has images" in capsys.readouterr().err
    bare = make_model(tiny_model, tmp_path / "bare", seed=1)
    assert remix_merge(tmp_path / "out", tiny_model, "ties", [bare], *options, "arithmetic", kind="--models") == 2
    assert f"--model {bare}: no tokenizer (tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
