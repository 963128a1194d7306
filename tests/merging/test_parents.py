"""What is no parent for a base: one clear error each, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from remix.models import files
from tests.merging.making import lora, make_adapter, make_model, remix_merge
from tests.tiny import EMBEDDED, make_tiny_model


@pytest.fixture(scope="module")
def base(tiny_untied_model: Path) -> Path:
    return tiny_untied_model


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("parents") / "adapter", lora(), seed=1)


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(base, tmp_path_factory.mktemp("parents") / "model", seed=1)


def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, base: Path, parents: list[Path], *options: str,
    kind: str = "--adapters", method: str = "task_arithmetic",
) -> str:  # fmt: skip
    """The error, after which nothing is there that was not before."""
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert remix_merge(tmp_path / "out", base, method, parents, *options, kind=kind) == 2
    assert sorted(tmp_path.rglob("*")) == before
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    return error


def changed(
    adapter: Path, folder: Path, tensors: Callable[[dict[str, Any]], dict[str, Any]] = dict, **config: Any
) -> Path:
    """A copy with other configuration or tensors."""
    folder.mkdir()
    own = json.loads((adapter / files.ADAPTER_CONFIG).read_text())
    (folder / files.ADAPTER_CONFIG).write_text(json.dumps(own | config))
    own = tensors(load_file(adapter / files.ADAPTER_WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, folder / files.ADAPTER_WEIGHTS)
    return folder


# --- adapters -----------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(tmp_path / "other", tie=False, seed=9)
    stranger = make_adapter(other, tmp_path / "stranger", lora(), seed=2)
    error = refused(capsys, tmp_path, base, [adapter, stranger])
    assert f"--adapters {stranger} was trained on another base, {other}, not on {base}: give --base {other}" in error
    # The same name for other weights.
    namesake = make_tiny_model(tmp_path / "deep" / base.name, tie=False, seed=9)
    error = refused(capsys, tmp_path, namesake, [adapter])
    assert "was trained on another base" in error


def test_an_adapter_of_another_shape(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsaid: dict[str, Any] = {"base_model_name_or_path": None}

    def narrow(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: tensor[..., :48] if "lora_A" in key else tensor for key, tensor in tensors.items()}

    wrong = changed(adapter, tmp_path / "wrong", narrow, **unsaid)
    assert "has shape [4, 48], and model.layers.0" in refused(capsys, tmp_path, base, [wrong])
    half = changed(adapter, tmp_path / "half", lambda t: {k: v for k, v in t.items() if "lora_A" in k}, **unsaid)
    assert "one half of a LoRA" in refused(capsys, tmp_path, base, [half])
    elsewhere = changed(adapter, tmp_path / "elsewhere", lambda t: {k.replace("layers.1", "layers.7"): v
                                                                    for k, v in t.items()}, **unsaid)  # fmt: skip
    error = refused(capsys, tmp_path, base, [elsewhere])
    assert "changes model.layers.7.mlp.down_proj.weight" in error
    assert "a Qwen2ForCausalLM, has no such tensor" in error
    assert "holds no weights" in refused(capsys, tmp_path, base, [changed(adapter, tmp_path / "empty", lambda _: {})])


def test_adapters_of_different_kinds(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    ia3 = make_adapter(base, tmp_path / "ia3", config, seed=2)
    assert "is of type IA3" in refused(capsys, tmp_path, base, [adapter, ia3])
    error = refused(capsys, tmp_path, base, [ia3], "--as", "adapter")
    assert "adapters of type IA3 are merged into a model: choose --as model" in error


def test_kinds_that_are_no_change_of_weights(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), prompt).save_pretrained(tmp_path / "prompt")
    error = refused(capsys, tmp_path, base, [tmp_path / "prompt"])
    assert "an adapter of type PROMPT_TUNING has no task vectors to merge; these have: LORA, IA3, LN_TUNING" in error
    for index, (key, value) in enumerate(
        {"init_lora_weights": "pissa_niter_4", "trainable_token_indices": [1], "target_parameters": ["x"]}.items()
    ):
        odd = changed(adapter, tmp_path / f"odd{index}", **{key: value})
        assert (key if key != "init_lora_weights" else "pissa_niter_4, which changes the base") in refused(
            capsys, tmp_path, base, [odd]
        )
    for index, (key, value) in enumerate({"lora_alpha": "x", "alpha_pattern": {"(": 3}, "alpha_pattern ": 0}.items()):
        odd = changed(adapter, tmp_path / f"scaled{index}", **{key.strip(): value or {"(q+)+z": 3, "q_proj": [1]}})
        assert str(odd) in refused(capsys, tmp_path, base, [odd])
    strange = changed(
        adapter, tmp_path / "strange", lambda t: {**t, "base_model.model.x.vera_lambda_b": torch.zeros(3)}
    )
    assert "x.vera_lambda_b is no change of a weight" in refused(capsys, tmp_path, base, [strange])


def test_missing_and_pickled_adapters(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--adapters {tmp_path}/none: no such directory" in refused(capsys, tmp_path, base, [tmp_path / "none"])
    pickled = changed(adapter, tmp_path / "pickled")
    (pickled / files.ADAPTER_WEIGHTS).rename(pickled / "adapter_model.bin")
    assert "a pickle can run code when it is opened" in refused(capsys, tmp_path, base, [pickled])
    torn = changed(adapter, tmp_path / "torn")
    (torn / files.ADAPTER_WEIGHTS).write_bytes((torn / files.ADAPTER_WEIGHTS).read_bytes()[:-100])
    assert "not readable" in refused(capsys, tmp_path, base, [torn])
    (torn / files.ADAPTER_CONFIG).write_text("{")
    assert f"{files.ADAPTER_CONFIG} is not readable" in refused(capsys, tmp_path, base, [torn])
    (torn / files.ADAPTER_CONFIG).unlink()
    assert f"no {files.ADAPTER_CONFIG} there" in refused(capsys, tmp_path, base, [torn])
    assert "holds an adapter, not a model" in refused(capsys, tmp_path, adapter, [adapter])


def test_a_tied_head_is_never_touched_in_silence(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, config in enumerate(
        (
            lora(target_modules=["q_proj", "lm_head"]),
            lora(modules_to_save=["embed_tokens"]),
            lora(modules_to_save=["lm_head"]),
        )
    ):
        tied = make_adapter(tiny_model, tmp_path / f"tied{index}", config, seed=1)
        error = refused(capsys, tmp_path, tiny_model, [tied])
        assert "which the base shares with another layer, so that a merge would change both" in error


def test_factors_need_plain_loras(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dora = make_adapter(base, tmp_path / "dora", lora(use_dora=True), seed=1)
    error = refused(capsys, tmp_path, base, [adapter, dora], "--lora-form", "factors")
    assert "changes model.layers.0.mlp.down_proj.weight by A, B, magnitude" in error
    assert "choose --lora-form delta" in error
    head = make_adapter(base, tmp_path / "head", LoraConfig(r=2, target_modules=["v_proj", "o_proj"]), seed=1)
    copied = make_adapter(base, tmp_path / "copied", lora(modules_to_save=["v_proj"]), seed=1)
    error = refused(capsys, tmp_path, base, [head, copied], "--lora-form", "factors")
    assert f"{copied} changes model.layers.0.self_attn.v_proj" in error
    assert f"by copy, {head} by A, B" in error
    biased = make_adapter(base, tmp_path / "biased", lora(bias="lora_only"), seed=1)
    error = refused(capsys, tmp_path, base, [biased], "--as", "adapter")
    assert "q_proj.bias was trained beside a LoRA on its layer" in error


# --- whole models -------------------------------------------------------------------------------------------------


def test_models_that_are_not_of_the_base(
    base: Path, adapter: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*parents: Path) -> str:
        return refused(capsys, tmp_path, base, list(parents), kind="--models")

    assert "lm_head.weight is only in the base" in refusal(model, make_tiny_model(tmp_path / "tied"))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(65)}, other / "model.safetensors")
    assert "model.norm.weight has shape [65], in the base [64]" in refusal(other)
    save_file({**tensors, "model.extra": torch.ones(5)}, other / "model.safetensors")
    assert "model.extra is not in the base" in refusal(other)
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    assert "a pickle can run code" in refusal(other)
    assert "config.json" in refusal(tmp_path)
    assert f"--models {adapter}: holds an adapter: give it by --adapters" in refusal(adapter)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["LlavaForConditionalGeneration"]}))
    assert f"--models {other} is a LlavaForConditionalGeneration, the base {base} a Qwen2ForCausalLM" in refusal(other)


def test_a_base_that_is_quantised(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / base.name
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    assert "its weights are quantised" in refused(capsys, tmp_path, copy, [adapter])


# --- merges of merges ---------------------------------------------------------------------------------------------


def test_a_base_that_is_merged_already(
    base: Path, adapter: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = make_adapter(base, tmp_path / "second", lora(), seed=7)
    merged = tmp_path / base.name  # its name alone would make it the adapters' base
    assert remix_merge(merged, base, "linear", [adapter]) == 0
    for file in base.glob("token*"):
        shutil.copy(file, merged)
    error = refused(capsys, tmp_path, merged, [adapter])
    assert f"{adapter} is in the base {merged} already, which is a merge of it" in error
    assert "was trained on another base" in refused(capsys, tmp_path, merged, [second])
    unsaid = changed(second, tmp_path / "unsaid", base_model_name_or_path=f"hub/{base.name}")
    error = refused(capsys, tmp_path, merged, [unsaid])
    assert f"it was trained on hub/{base.name}, and {merged} is already merged" in error
    assert f"give --base {base}" in error
    # What was trained on the merge goes onto it; and then the first is in there still.
    onto = make_adapter(merged, tmp_path / "onto", lora(), seed=8)
    assert remix_merge(tmp_path / "twice", merged, "linear", [onto]) == 0
    assert "is in the base" in refused(capsys, tmp_path, tmp_path / "twice", [adapter])
    assert remix_merge(tmp_path / "models", base, "linear", [model], kind="--models") == 0
    assert "is in the base" in refused(capsys, tmp_path, tmp_path / "models", [model], kind="--models")


def test_a_merged_adapter_holds_its_parents(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = make_adapter(base, tmp_path / "second", lora(), seed=7)
    both = tmp_path / "both"
    assert remix_merge(both, base, "linear", [adapter, second], "--as", "adapter") == 0
    assert f"{both} is a merge that holds {second} already" in refused(capsys, tmp_path, base, [both, second])
    shutil.copytree(second, tmp_path / "copy")
    assert "are the same: name it once" in refused(capsys, tmp_path, base, [second, tmp_path / "copy"])
    changed_base = tmp_path / "deeper" / base.name
    make_model(base, changed_base, seed=3)
    config = json.loads((both / files.ADAPTER_CONFIG).read_text())
    (both / files.ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": f"hub/{base.name}"}))
    assert "was merged for other weights" in refused(capsys, tmp_path, changed_base, [both])
    (both / "merge.json").write_text('{"parents": 3}')
    assert "not the record of a merge" in refused(capsys, tmp_path, base, [both])


# --- the request --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tis", [], "no merge method 'tis'; did you mean 'ties'?"),
        ("ties", ["--weights", "1", "2"], "2 weights for 1 parents; give one to each"),
        ("linear", ["--weights", "nan"], "are not finite"),
        ("linear", ["--weights", "-1"], "choose task_arithmetic"),
        ("linear", ["--density", "0.5"], "linear has no parameter 'density'"),
        ("ties", ["--density", "1.5"], "density is 1.5, but must be a number from 0 to 1"),
        ("ties", ["--param", "elct=total"], "did you mean elect"),
        ("ties", ["--param", "elect"], "expected key=value"),
        ("slerp", [], "slerp merges exactly 2 models or adapters, not 1"),
        ("tall", ["--param", "task=4"], "task is 4, but of 1 parents it is at most 0"),
        ("consensus", [], "k is 2, but of 1 parents it is at most 1"),
        ("fisher", [], "give rollouts, one run directory each"),
        ("ties", ["--rollouts", "runs/x"], "leave them out"),
        ("fisher", ["--rollouts", "a", "b"], "2 run directories in rollouts for 1 parents"),
        ("fisher", ["--rollouts", "nowhere"], "rollouts nowhere: no rollouts/step=*.parquet"),
        ("ties", ["--rank", "4"], "rank belongs to save_as adapter"),
        ("ties", ["--limit", "4"], "limit and data_dir belong to evaluate"),
        ("ties", ["--evaluate", "arithmatic"], "did you mean 'arithmetic'"),
        ("ties", ["--shard-size", "0"], "shard_size"),
        ("ties", ["--models", "m"], "either adapters or models"),
        ("ties", ["--out", str(EMBEDDED)], "in use; name a new directory"),
    ],
)  # fmt: skip
def test_requests_that_contradict_themselves(
    method: str, options: list[str], message: str, base: Path, adapter: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert message in refused(capsys, tmp_path, base, [adapter], *options, method=method)


def test_recipes_that_are_wrong(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from remix import cli

    recipe = tmp_path / "merge.yaml"
    whole = {"base": str(base), "adapters": [str(adapter)], "method": "ties", "out": str(tmp_path / "out")}
    for change, message in (
        ({"wieghts": [1]}, "unknown key 'wieghts'; did you mean 'weights'?"),
        ({"overrides": [{"match": "*.nothing.*", "density": 0.5}]}, "'*.nothing.*' matches no tensor"),
        ({"overrides": [{"match": "*", "weights": [1, 2]}]}, "overrides: 2 weights for 1 parents"),
        ({"overrides": [{"match": "*", "params": {"densty": 1}}]}, "did you mean density"),
        ({"base": None}, "base"),
        ({"adapters": ["./nowhere"]}, f"{tmp_path}/nowhere: no such directory"),
        ({"out": None}, "out is required"),
    ):
        recipe.write_text(json.dumps({key: value for key, value in {**whole, **change}.items() if value is not None}))
        assert cli.main(["merge", "--recipe", str(recipe)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert cli.main(["merge", "--recipe", str(tmp_path / "none.yaml")]) == 2
    assert "no such recipe" in capsys.readouterr().err
    assert cli.main(["merge"]) == 2
    assert "base: is required" in capsys.readouterr().err
