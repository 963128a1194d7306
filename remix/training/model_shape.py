"""How large a model is, counted from its config.json alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remix.config import ModelConfig

DECODERS: Mapping[str, Mapping[str, int | None]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32},
    "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128},
}  # fmt: skip
"""By model_type, decoders of the Llama kind, and what a config.json leaves out where it is so (transformers' own)."""
CLIP_TOWER = "clip_vision_model"
CLIP: Mapping[str, int] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_channels": 3, "image_size": 224,
    "patch_size": 32,
}  # fmt: skip
"""The same of its vision tower."""
Matrix = tuple[int, int, bool]
"""Input width, output width, whether it has a bias."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Of one transformer block."""

    parameters: int
    norms: int
    """Parameters of its normalisations, which have no biases."""
    biases: int
    cache: int
    """Numbers that one token has in the attention cache: keys and values."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on."""

    parameters: int
    backbone: int
    """Parameters without an output head of their own: what a critic's backbone holds."""
    hidden_size: int
    vocab_size: int
    positions: int | None = None
    """Longest sequence that the model was made for; None = unknown, or stretched by RoPE scaling."""
    linears: Mapping[str, tuple[int, int]] | None = None
    """Input and output width of every matrix that an adapter can be put on, by module name; None = unknown."""
    blocks: int = 0
    block: BlockShape | None = None
    """Of the language model; None = unknown."""
    images: bool | None = None
    """Whether it sees any; None = unknown."""

    @property
    def tied(self) -> bool:
        """The output head is the embedding."""
        return self.parameters == self.backbone


def is_target(module: str, targets: str | tuple[str, ...]) -> bool:
    """PEFT's rule: a string is a pattern of the whole name, a list holds names or their ends."""
    if targets == "all-linear":
        return not module.endswith(("embed_tokens", "lm_head"))
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def find_shape(model: ModelConfig) -> ModelShape | None:
    """From the directory's config.json, else from the hub's local cache, else from `model.size`. No network."""
    path = _config_path(model)
    if path is not None:
        shape = shape_from_config(json.loads(path.read_text(encoding="utf-8")))
        if shape is not None:
            return shape
    if model.size is None:
        return None
    size = model.size
    return ModelShape(size.parameters, size.parameters, size.hidden_size, size.vocab_size, blocks=size.num_layers)


def uncounted(model: ModelConfig) -> str:
    """Why `find_shape` found nothing, and the remedy."""
    path = _config_path(model)
    kind = None if path is None else json.loads(path.read_text(encoding="utf-8")).get("model_type")
    why = "is not on this machine" if path is None else f"is of a kind (model_type {kind}) that is not counted"
    return f"{model.path} {why}: set model.size to count memory"


def _config_path(model: ModelConfig) -> Path | None:
    path = Path(model.path) / "config.json"
    if not os.path.isdir(model.path):  # unlike Path.is_dir, False for what is too long for a path
        path = _cached_config(model.path, model.revision) or path
    return path if os.path.isfile(path) else None


def _cached_config(repo: str, revision: str | None) -> Path | None:
    if repo.count("/") > 1 or repo.startswith(("/", ".", "~")):
        return None  # a path, no hub id
    from huggingface_hub import try_to_load_from_cache  # slow to import

    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def shape_from_config(config: Mapping[str, Any]) -> ModelShape | None:
    """Exact for decoders of the Llama kind, which Qwen's are, and for LLaVA with CLIP before one of them; None for any
    other."""
    if config.get("model_type") == "llava":
        return _llava(config)
    return _decoder(config) if config.get("model_type") in DECODERS else None


def _decoder(config: Mapping[str, Any], inside: str = "model") -> ModelShape:
    """`inside`: the module that has the blocks."""
    family = config["model_type"]
    config = {**DECODERS[family], **config}
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention, kv = heads * head_dim, (config["num_key_value_heads"] or heads) * head_dim
    mlp = config["intermediate_size"]
    qkv_bias = family == "qwen2" or bool(config.get("attention_bias"))
    output_bias = family != "qwen2" and bool(config.get("attention_bias"))
    mlp_bias = bool(config.get("mlp_bias"))
    matrices: dict[str, Matrix] = {
        "self_attn.q_proj": (hidden, attention, qkv_bias),
        "self_attn.k_proj": (hidden, kv, qkv_bias),
        "self_attn.v_proj": (hidden, kv, qkv_bias),
        "self_attn.o_proj": (attention, hidden, output_bias),
        "mlp.gate_proj": (hidden, mlp, mlp_bias),
        "mlp.up_proj": (hidden, mlp, mlp_bias),
        "mlp.down_proj": (mlp, hidden, mlp_bias),
    }
    norms = 2 * hidden + (2 * head_dim if family == "qwen3" else 0)
    layer = norms + _numbers(matrices)
    backbone = vocab * hidden + layers * layer + hidden
    stretched = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    return ModelShape(
        parameters=backbone + (0 if config.get("tie_word_embeddings") else vocab * hidden),
        backbone=backbone,
        hidden_size=hidden,
        vocab_size=vocab,
        positions=config.get("max_position_embeddings") if stretched == "default" else None,
        blocks=layers,
        block=BlockShape(
            parameters=layer, norms=norms, biases=sum(out * bias for _, out, bias in matrices.values()), cache=2 * kv
        ),
        linears={
            **_of_layers(f"{inside}.layers", layers, matrices),
            f"{inside}.embed_tokens": (vocab, hidden),
            "lm_head": (hidden, vocab),
        },
        images=False,
    )


def _llava(config: Mapping[str, Any]) -> ModelShape | None:
    """A vision tower, two matrices between, and a decoder."""
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    if text.get("model_type", "llama") not in DECODERS or vision.get("model_type", CLIP_TOWER) != CLIP_TOWER:
        return None
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    decoder = _decoder({"model_type": "llama", **text, "tie_word_embeddings": tied}, "model.language_model")
    tower, linears, width = _clip(vision)
    layers, bias = config.get("vision_feature_layer", -2), bool(config.get("multimodal_projector_bias", True))
    joined = width * (len(layers) if isinstance(layers, list) else 1)
    between: dict[str, Matrix] = {
        "linear_1": (joined, decoder.hidden_size, bias),
        "linear_2": (decoder.hidden_size, decoder.hidden_size, bias),
    }
    before = tower + _numbers(between)
    projector = {f"model.multi_modal_projector.{name}": (rows, out) for name, (rows, out, _) in between.items()}
    assert decoder.linears is not None
    return replace(
        decoder,
        parameters=decoder.parameters + before,
        backbone=decoder.backbone + before,
        linears={**linears, **projector, **decoder.linears},
        images=True,
    )


def _clip(config: Mapping[str, Any]) -> tuple[int, Mapping[str, tuple[int, int]], int]:
    """Parameters, matrices and width of a CLIP vision tower. One more position is the class token's."""
    config = {**CLIP, **config}
    hidden, mlp, patch, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "patch_size", "num_hidden_layers")
    )
    matrices: dict[str, Matrix] = {
        **{f"self_attn.{name}_proj": (hidden, hidden, True) for name in ("q", "k", "v", "out")},
        "mlp.fc1": (hidden, mlp, True),
        "mlp.fc2": (mlp, hidden, True),
    }
    norm = 2 * hidden  # weight and bias
    positions = (config["image_size"] // patch) ** 2 + 1
    embeddings = hidden * config["num_channels"] * patch**2 + hidden + positions * hidden
    parameters = embeddings + layers * (2 * norm + _numbers(matrices)) + 2 * norm
    return parameters, _of_layers("model.vision_tower.encoder.layers", layers, matrices), hidden


def _numbers(matrices: Mapping[str, Matrix]) -> int:
    return sum(rows * columns + columns * bias for rows, columns, bias in matrices.values())


def _of_layers(inside: str, layers: int, matrices: Mapping[str, Matrix]) -> dict[str, tuple[int, int]]:
    return {
        f"{inside}.{index}.{name}": (rows, columns)
        for index in range(layers)
        for name, (rows, columns, _) in matrices.items()
    }
