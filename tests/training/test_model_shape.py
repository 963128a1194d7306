"""Parameters counted from a config.json, against the models themselves, hand arithmetic and what is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from remix.config import LoraAdapter, ModelConfig
from remix.models.adapters import trained_share
from remix.training.memory import estimate_memory, lora_parameters
from remix.training.model_shape import CLIP, CLIP_TOWER, DECODERS, find_shape, shape_from_config
from tests.tiny import KINDS, make_tiny_vision_model, opened, tiny_recipe
from tests.training.test_plan import TINY


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("config", "model"),
    [
        (Qwen2Config(**TINY), Qwen2ForCausalLM),
        (Qwen3Config(**TINY, head_dim=32), Qwen3ForCausalLM),
        (Qwen3Config(**TINY, attention_bias=True), Qwen3ForCausalLM),
        (LlamaConfig(**TINY, attention_bias=True, mlp_bias=True), LlamaForCausalLM),
        (LlamaConfig(**TINY), LlamaForCausalLM),
        (MistralConfig(**TINY, head_dim=8), MistralForCausalLM),
    ],
)
def test_parameters_are_those_of_the_model(config: Any, model: Any, tied: bool, tmp_path: Path) -> None:
    config.tie_word_embeddings = tied
    module = model(config)
    config.save_pretrained(tmp_path)
    shape = find_shape(ModelConfig(path=str(tmp_path)))
    assert shape is not None
    assert shape.parameters == module.num_parameters()
    assert shape.backbone == module.model.num_parameters()
    assert (shape.hidden_size, shape.vocab_size, shape.positions) == (64, 23, config.max_position_embeddings)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("mlp.down_proj",), r".*\.1\..*_proj"])
def test_adapter_parameters_are_those_of_peft(targets: str | tuple[str, ...], dora: bool) -> None:
    config = Qwen2Config(**TINY)
    names = targets if isinstance(targets, str) else list(targets)
    module = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=4, target_modules=names, use_dora=dora))
    shape = shape_from_config(config.to_dict())
    assert shape is not None
    counted = lora_parameters(shape, LoraAdapter(rank=4, targets=targets, dora=dora))
    assert counted == module.get_nb_trainable_parameters()[0]


def test_the_published_sizes_follow_from_the_configs() -> None:
    qwen = {"model_type": "qwen2", "num_hidden_layers": 28, "tie_word_embeddings": False}
    small = shape_from_config(
        {**qwen, "hidden_size": 1536, "intermediate_size": 8960, "vocab_size": 151936}
        | {"num_attention_heads": 12, "num_key_value_heads": 2}
    )
    large = shape_from_config(
        {**qwen, "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
        | {"num_attention_heads": 28, "num_key_value_heads": 4}
    )
    assert small is not None
    assert large is not None
    assert (small.parameters, large.parameters) == (1777088000, 7615616512)


def test_what_a_config_leaves_out() -> None:
    """As transformers fills it in. It makes None of heads and their size a number by itself, which is checked above."""
    bare = AutoConfig.for_model("llava", text_config={"model_type": "llama"}, vision_config={"model_type": CLIP_TOWER})
    configs = {name: AutoConfig.for_model(name) for name in DECODERS}
    for config, left_out in [*((configs[name], DECODERS[name]) for name in DECODERS), (bare.vision_config, CLIP)]:
        known = {key: value for key, value in left_out.items() if value is not None}
        assert {key: getattr(config, key) for key in known} == known


# --- vision-language models ---------------------------------------------------------------------------------------


def test_a_vision_language_model_is_counted_whole(tiny_vision_model: Path) -> None:
    """To the parameter, and every matrix by its module's name."""
    shape = find_shape(ModelConfig(path=str(tiny_vision_model)))
    lm = AutoModelForImageTextToText.from_pretrained(tiny_vision_model)
    assert shape is not None
    assert (shape.parameters, shape.backbone) == (lm.num_parameters(), lm.model.num_parameters())
    matrices = {name: module for name, module in lm.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name: (module.in_features, module.out_features) for name, module in matrices.items()}
    assert shape.linears == found | {"model.language_model.embed_tokens": tuple(lm.get_input_embeddings().weight.shape)}


def test_vision_language_models_by_hand() -> None:
    """Their vision towers have biases everywhere but in the patches, and norms of two vectors."""
    small = find_shape(ModelConfig(path="recipes/embedded/shapes_base"))
    # Tower: patches 128·3·8² + class 128 + (4² + 1)·128, norms 4·128 before and after the layers, 3 layers of
    # 4·(128² + 128) + 2·128·256 + 256 + 128 + 4·128; between: 2·(128² + 128).
    tower = 24_576 + 128 + 2_176 + 512 + 3 * (66_048 + 65_920 + 512)
    # Decoder: 65·128, tied; 4 layers of q, o 128² each, k, v 128·64 each, biases 128 + 2·64, 3·128·256, norms 2·128.
    decoder = 8_320 + 4 * (32_768 + 16_384 + 256 + 98_304 + 256) + 128
    assert small is not None
    assert small.parameters == small.backbone == tower + 33_024 + decoder
    # As the hub has LLaVA 1.5 7B: what is transformers' default is left out.
    large = shape_from_config(
        {
            "model_type": "llava",
            "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
            },
        }
    )  # fmt: skip
    # 6,738,939,904 as Vicuna with 64 tokens more, 303,507,456 as CLIP ViT-L/14 at 336 pixels, 20,979,712 between them.
    assert large is not None
    assert large.parameters == 6_738_939_904 + 303_507_456 + 20_979_712 == 7_063_427_072


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rslora"])
def test_adapters_of_vision_language_models(kind: str, tiny_vision_model: Path, tmp_path: Path) -> None:
    """On the vision tower and what is between, where their names are those of the targets."""
    changes = {"adapter": KINDS[kind] | ({"targets": "all-linear"} if kind == "lora" else {})}
    memory = estimate_memory(tiny_recipe(tiny_vision_model, tmp_path, changes))
    with opened(tiny_recipe(tiny_vision_model, tmp_path, changes)) as t:
        share = trained_share(t.policy.module.lm)
    assert (memory.trained, memory.share) == (share.trained, pytest.approx(share.share))


def test_a_separate_critic_has_the_vision_tower_too(tiny_vision_model: Path, tmp_path: Path) -> None:
    changes = {"advantage": {"type": "gae", "critic": {"type": "separate"}}}
    memory = estimate_memory(tiny_recipe(tiny_vision_model, tmp_path, changes))
    with opened(tiny_recipe(tiny_vision_model, tmp_path, changes)) as t:
        assert memory.trained == sum(p.numel() for p in t.policy.module.parameters() if p.requires_grad)


def test_other_vision_language_models_are_not_counted(tmp_path: Path) -> None:
    make_tiny_vision_model(tmp_path / "model", family="paligemma")
    memory = estimate_memory(tiny_recipe(tmp_path / "model", tmp_path / "run"))
    assert memory.unknown == (
        f"{tmp_path / 'model'} is of a kind (model_type paligemma) that is not counted: set model.size to count memory"
    )
