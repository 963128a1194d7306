"""Tiny random models of other families than those of tests/tiny.py, each with its own kind of forward inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from tests.tiny import EMBEDDED, make_tiny_vision_model

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def from_folder(family: str, folder: Path) -> tuple[Any, Any]:
    make_tiny_vision_model(folder, family=family)
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


class ImagesOnly(Qwen2VLProcessor):
    """Without its processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        pass


def qwen2_vl(folder: Path) -> tuple[Any, Any]:
    """Patches of all images in one row, a grid for each, and token types from which positions are counted."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    pixels = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT},
        vision_config={
            "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "hidden_size": 64,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config), ImagesOnly(pixels, tokenizer, video_processor=None)


def gemma3(folder: Path) -> tuple[Any, Any]:
    """Tokens of an image see one another; the text's placeholder is another token than those that the model sees."""
    special = {"image_token": "<soft>", "boi_token": "<begin>", "eoi_token": "<end>"}
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base", extra_special_tokens=special)
    pixels = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    config = Gemma3Config(
        text_config={"vocab_size": len(tokenizer), "head_dim": 32, "sliding_window": 8, **TEXT},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return Gemma3ForConditionalGeneration(config), Gemma3Processor(pixels, tokenizer, image_seq_length=4)


def idefics3(folder: Path) -> tuple[Any, Any]:
    """An image is cut into as many pieces as its size takes, with a mask of pixels."""
    special = {
        "image_token": "<image>", "global_image_token": "<global-img>", "fake_image_token": "<fake_token_around_image>",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base", extra_special_tokens=special)
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=4)
    config = Idefics3Config(
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT},
        vision_config=SIGLIP,
        scale_factor=2,
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Idefics3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "llava": lambda folder: from_folder("llava", folder),
    "paligemma": lambda folder: from_folder("paligemma", folder),
    "qwen2_vl": qwen2_vl,
    "gemma3": gemma3,
    "idefics3": idefics3,
}
"""By name, what builds a random model and its processor."""


def lively(lm: Any) -> Any:
    """Weights large enough that every input shows in the outputs."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lm.eval()
