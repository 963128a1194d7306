"""Tiny models by transformers, whose log-probs vLLM's must be, and what no engine may change in its process."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from remix.types import Completion, Request

VOCABULARY, EOS = 60, 1  # 60 is no multiple of vLLM's padding (64)
MAX_MODEL_LEN = 512
# vLLM caches prompts by blocks of 128 tokens: this one fills three.
LONG_PROMPT = tuple(2 + (7 * i * i + 3 * i) % (VOCABULARY - 2) for i in range(400))
SHORT_PROMPT = (5, 9, 14)
REQUESTS = [Request(LONG_PROMPT, seed) for seed in range(3)] + [Request(SHORT_PROMPT, seed) for seed in range(3)]


def tiny_model(tied: bool, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=tied,
        # Far wider than the default .02: attention must matter, so that a stale cache or weight shows.
        initializer_range=0.15,
        eos_token_id=EOS,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    for name, weight in model.named_parameters():
        if "bias" in name or "norm" in name:  # transformers starts these at 0 and 1 under every seed
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.2)
    return model


@torch.no_grad()
def reference_logprobs(
    model: Qwen2ForCausalLM, prompt: Sequence[int], completion: Completion, temperature: float
) -> Tensor:
    """[R] log-probs of the response by transformers."""
    ids = torch.cat([torch.tensor(prompt), completion.response_ids])
    logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, completion.response_ids[:, None])[:, 0]


def assert_logprobs_of(model: Qwen2ForCausalLM, requests: list[Request], got: list[Completion], t: float) -> None:
    for request, completion in zip(requests, got, strict=True):
        expected = reference_logprobs(model, request.prompt_ids, completion, t)
        torch.testing.assert_close(completion.sampler_logprobs, expected, atol=1e-4, rtol=0)


def checkpoint(model: Qwen2ForCausalLM, with_head: bool = True) -> dict[str, Tensor]:
    """Weights by their names in a checkpoint; a tied head is among them only with `with_head`."""
    weights = dict(model.state_dict())
    if not with_head:
        del weights["lm_head.weight"]
    return weights


def saved(model: Qwen2ForCausalLM, path: Path) -> str:
    model.save_pretrained(path)
    return str(path)


def trainer_state() -> dict[str, Any]:
    numpy_state = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "dynamo": torch._dynamo.config.disable,
        "environment": {name: os.environ.get(name) for name in ("LD_PRELOAD", "RANK", "LOCAL_WORLD_SIZE")},
    }
