"""Tiny models and recipes on which the real call path runs in a second."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GemmaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from remix.config import Recipe, parse_recipe

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "recipes" / "embedded"


def make_tiny_model(folder: Path, *, tie: bool = True, seed: int = 5) -> Path:
    """A random Qwen2 of 2 layers, saved with the embedded model's character tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # far from uniform, so that policies differ
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_vision_model(folder: Path, *, family: str = "llava", seed: int = 5) -> Path:
    """A random vision-language model of 2 + 2 layers, saved with its processor: LLaVA (CLIP and Qwen2), which has
    nothing but pixels beside the text, or PaliGemma (SigLIP and Gemma), whose prompts are read in both directions."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "bos_token": "<eos>"})
    size = {"height": 16, "width": 16}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": 16, "patch_size": 8, "projection_dim": 64,
    }  # fmt: skip
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
    }  # fmt: skip
    if family == "llava":
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
        processor = LlavaProcessor(
            pixels, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **text),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=4,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
        kind = LlavaForConditionalGeneration
    else:
        pixels = SiglipImageProcessorPil(size=size)
        pixels.image_seq_length = 4
        processor = PaliGemmaProcessor(pixels, tokenizer)
        config = PaliGemmaConfig(
            vision_config=SiglipVisionConfig(**vision),
            text_config=GemmaConfig(vocab_size=len(processor.tokenizer), **text),
            image_token_index=processor.image_token_id,
            projection_dim=64,
        )
        kind = PaliGemmaForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = kind(config)
        with torch.no_grad():  # images matter as much as words
            for name, parameter in lm.named_parameters():
                if "multi_modal_projector" in name or "patch_embedding" in name:
                    parameter.normal_(std=0.3)
    lm.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family == "llava":  # as checkpoints of the hub name the vision tower's weights, and engines look for them
        weights = load_file(folder / "model.safetensors")
        named = {name.replace("vision_tower.", "vision_tower.vision_model."): weights[name] for name in weights}
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_picture_task(folder: Path, count: int = 24) -> dict[str, Any]:
    """A jsonl task of coloured squares as PNG files: some rows name one, some two, some a list of none."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    names = []
    for index in range(count):
        picture = Image.new("RGB", (20, 16 + index % 3), "black")
        picture.paste(
            ("red", "green", "blue", "white")[index % 4], (index % 8, index % 7, index % 8 + 8, index % 7 + 8)
        )
        names.append(f"pictures/{index}.png")
        picture.save(folder / names[-1])
    rows = []
    for index, name in enumerate(names):
        shown: Any = [name, names[index - 1]] if index % 3 == 1 else [] if index % 3 == 2 else name
        problem = f"<image>{index}+<image>4=" if index % 3 == 1 else f"{index}+4="
        rows.append({"id": index, "problem": problem, "answer": str(index + 4), "shown": shown})
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return {"type": "jsonl", "path": str(path), "images": "shown", "holdout": 0.25}


def tiny_recipe(model: Path, run_dir: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """GRPO of two steps with rewards that vary by length, so that a random model has gradients; `changes` are merged
    into it, mapping by mapping."""
    plain: dict[str, Any] = {
        "run_dir": str(run_dir),
        "steps": 2,
        "model": {"path": str(model)},
        "tasks": [{"type": "arithmetic", "kinds": ["sum"], "min_terms": 3, "max_terms": 4, "size": 64}],
        "prompt": {"max_tokens": 16},
        "rewards": [{"type": "length", "free_tokens": 1, "max_tokens": 24}],
        "rollout": {"group_size": 4, "max_tokens": 24},
        "batch": {"prompts": 6, "minibatches": 2},
        "optimizer": {"lr": 1e-3, "critic_lr": 1e-3},
        "eval": {"every": 0, "prompts": 4},
        "log": {"trackers": []},
    }
    return parse_recipe(_merged(plain, changes or {}))


MIX = [{"type": "mix_policy", "off_policy_fraction": 0.5, "window": 2, "utd_ratio": 2}]
"""Phases of a run that replays."""


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "alpha": 8},
    "rslora": {"type": "lora", "rank": 4, "alpha": 8, "rslora": True},
    "dora": {"type": "lora", "rank": 4, "alpha": 8, "dora": True},
    "ia3": {"type": "ia3"},
    "prefix": {"type": "prefix", "tokens": 5},
    "prompt": {"type": "prompt", "tokens": 5},
    "layers": {"type": "layers", "last_blocks": 1, "norms": True, "biases": True},
}
"""Adapters of every kind, small."""


@contextmanager
def opened(recipe: Recipe, *, resume: bool = False) -> Iterator[Any]:
    """The trainer that `python -m remix.train` would build."""
    from remix.tracking.progress import Progress
    from remix.training.build import open_trainer
    from remix.training.distributed import Cluster

    progress = Progress("test", recipe.run_dir, recipe.last_step, enabled=False)
    with (
        Cluster(recipe.log.trackers, Path(recipe.run_dir)) as cluster,
        progress,
        open_trainer(recipe, cluster, progress, resume=resume) as trainer,
    ):
        yield trainer


def run(recipe: Recipe, *, resume: bool = False) -> dict[str, torch.Tensor]:
    """A run to its end; copies of all trained parameters."""
    from remix.training.finish import finish

    with opened(recipe, resume=resume) as trainer:
        trainer.fit()
        finish(trainer, "test.yaml")
        return weights_of(trainer)


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all trained parameters."""
    return {name: tensor.clone() for name, tensor in trainer.policy.weights(with_base=False).items()}


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and "type" not in value
        result[key] = _merged(result[key], value) if both else copy.deepcopy(value)
    return result
