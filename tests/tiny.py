"""Tiny models and recipes on which the real call path runs in a second."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

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

    cluster = Cluster(recipe.log.trackers, Path(recipe.run_dir))
    progress = Progress("test", recipe.run_dir, recipe.last_step, enabled=False)
    with progress, open_trainer(recipe, cluster, progress, resume=resume) as trainer:
        yield trainer


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all trained parameters."""
    return {name: tensor.clone() for name, tensor in trainer.policy.weights(with_base=False).items()}


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and "type" not in value
        result[key] = _merged(result[key], value) if both else copy.deepcopy(value)
    return result
