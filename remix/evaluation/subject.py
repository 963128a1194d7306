"""The model under evaluation: a directory or hub id, with or without an adapter, and the engine that samples from it.

An adapter is merged into the weights under either engine, so that both sample from the same policy. Virtual tokens,
which are no part of any weight, are put before each prompt by the hf engine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from remix.config import ModelConfig
from remix.models import files
from remix.models.adapter_files import VIRTUAL, check_base, kind_of, read_config, virtual_tokens
from remix.models.adapters import checkpoint_weights, with_saved_adapter
from remix.models.loading import (
    context_length,
    eos_token_ids,
    load_lm,
    load_processor,
    load_tokenizer,
    never_written,
    sees_images,
)
from remix.models.vision import Vision, check_vllm
from remix.training.refusals import check_model_directory
from remix.types import Engine

Dtype = Literal["float32", "bfloat16"]
EngineName = Literal["hf", "vllm"]

GPU_SHARE = 0.9
"""Of a GPU's memory for vLLM, which has it to itself here."""
CPU_CACHE_GIB = 1.0


@dataclass(frozen=True)
class Subject:
    """Found, fetched and checked, but not loaded."""

    model: str
    adapter: str | None
    folder: Path
    adapter_folder: Path | None
    dtype: Dtype
    tokenizer: Any
    processor: Any | None
    """Of a vision-language model."""
    context: int | None
    """Most tokens of a prompt and its response together, an adapter's virtual ones left out."""

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(path=str(self.folder), dtype=self.dtype)

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What was evaluated, down to the bytes: hashes of every file that has a say."""
        found = {
            "weights": files.fingerprint(self.folder, ["*.safetensors"]),
            "config": files.fingerprint(self.folder, ["config.json", "generation_config.json"]),
            "tokenizer": files.fingerprint(self.folder, files.TOKENIZER_FILES),
        }
        if self.processor is not None:
            found["processor"] = files.fingerprint(self.folder, files.PROCESSOR_FILES)
        if self.adapter_folder is not None:
            found["adapter"] = files.fingerprint(self.adapter_folder, files.ADAPTER_FILES)
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """The same for the same bytes, wherever they lie, but for `path`."""
        hashes = {name: found["sha256"] for name, found in self.fingerprints.items()}
        adapter = hashes.pop("adapter", None)
        return {
            "model": {"path": _place(self.model), "commit": files.commit(self.folder), **hashes},
            "adapter": None if self.adapter is None else {"path": _place(self.adapter), "sha256": adapter},
        }

    def decoder(self) -> Callable[[list[int]], str]:
        def decode(token_ids: list[int]) -> str:
            return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

        return decode

    def engine(self, name: EngineName, *, max_model_len: int, batch_size: int, images: int = 0) -> Engine:
        """Loads the weights. `max_model_len`: of the longest prompt and its response; `images`: most in one prompt."""
        if name == "hf":
            from remix.rollout.hf import HFEngine

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            lm = self._load()
            return HFEngine(
                lm.to(device).eval(),
                eos_token_ids=eos_token_ids(self.config, self.tokenizer),
                batch_size=batch_size,
                device=device,
                autocast=nullcontext,
                never=never_written(self.config),
                vision=None if self.processor is None else Vision(self.processor, lm),
            )
        from remix.rollout.vllm import VLLMEngine

        merged = None if self.adapter_folder is None else self._load()  # first: it may not fit
        engine = VLLMEngine(
            str(self.folder),
            dtype=self.dtype,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids(self.config, self.tokenizer),
            memory_fraction=GPU_SHARE,
            kv_cache_gib=CPU_CACHE_GIB,
            images=images,
            never=never_written(self.config),
        )
        if merged is not None:
            engine.sync(checkpoint_weights(merged))
        return engine

    def _load(self) -> Any:
        lm = load_lm(self.config, self.tokenizer, getattr(torch, self.dtype))
        return lm if self.adapter_folder is None else with_saved_adapter(lm, self.adapter_folder)


def find_subject(
    model: str,
    adapter: str | None,
    *,
    revision: str | None = None,
    dtype: Dtype | None = None,
    engine: EngineName = "hf",
    with_images: bool = False,
) -> Subject:
    """`with_images`: it will be shown some.

    Raises ValueError with the remedy where model or adapter cannot be had, or do not belong together.
    """
    folder = files.find(model, revision, files.MODEL_FILES, "--model")
    if not (folder / "config.json").exists() and (folder / files.ADAPTER_CONFIG).exists():
        base = read_config(folder, f"--model {model}").get("base_model_name_or_path") or "its base model"
        raise ValueError(f"--model {model} is an adapter: give --model {base} --adapter {model}")
    adapter_folder, ahead = None, 0
    if adapter is not None:
        adapter_folder = files.find(adapter, None, files.ADAPTER_FILES, "--adapter")
        saved = read_config(adapter_folder, f"--adapter {adapter}")
        check_base(saved, f"--adapter {adapter}", "--model", model, folder)
        ahead = virtual_tokens(saved)
        if ahead and engine == "vllm":
            raise ValueError(
                f"--adapter {adapter}: vLLM does not serve {VIRTUAL[kind_of(saved)]} adapters; add --engine hf"
            )
    try:
        check_model_directory(folder)
    except ValueError as error:
        raise ValueError(f"--model {error}") from None
    config = ModelConfig(path=str(folder))
    context, processor = context_length(config), load_processor(config, needed=with_images)
    if engine == "vllm" and sees_images(config):
        check_vllm(model)
    return Subject(
        model=model,
        adapter=adapter,
        folder=folder,
        adapter_folder=adapter_folder,
        dtype=dtype or ("bfloat16" if torch.cuda.is_available() else "float32"),
        tokenizer=load_tokenizer(config, processor),
        processor=processor,
        context=None if context is None else context - ahead,
    )


def _place(path: str) -> str:
    """A directory from the root, a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
