"""Tiny policies, their log-probs by transformers alone, and how far the two are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from remix.models.loading import load_actor_critic, load_tokenizer
from remix.models.policy import Policy
from remix.types import Batch, Rollout
from tests.tiny import tiny_recipe

CPU = torch.device("cpu")
LORAS = {
    "lora": {"type": "lora", "rank": 4, "alpha": 8},
    "rslora": {"type": "lora", "rank": 4, "alpha": 8, "rslora": True},
    "dora": {"type": "lora", "rank": 4, "alpha": 8, "dora": True},
}


def made(length: tuple[int, int], seed: int) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    prompt, response = (torch.randint(2, 16, (n,), generator=generator) for n in length)
    return Rollout(
        prompt_ids=prompt,
        response_ids=response,
        sampler_logprobs=torch.zeros(length[1]),
        policy_version=0,
        finish_reason="length",
        seed=seed,
        text="",
    )


ROLLOUTS = [made(length, i) for i, length in enumerate([(3, 5), (1, 1), (7, 2), (2, 11), (4, 4)])]


def policy_of(path: Path, /, temperature: float = 1.0, **changes: Any) -> Policy:
    recipe = tiny_recipe(path, Path("unused"), {"rollout": {"temperature": temperature}, **changes})
    tokenizer = load_tokenizer(recipe.model)
    module = load_actor_critic(recipe, tokenizer, CPU)
    return Policy(module, tokenizer, device=CPU, temperature=temperature)


def scored(policy: Policy, budget: int = 10_000, anchor: dict[str, Tensor] | None = None) -> list[Tensor]:
    return [score.logprobs for score in policy.score(ROLLOUTS, tokens_per_microbatch=budget, anchor=anchor)]


@torch.no_grad()
def plain_logprobs(lm: Any, temperature: float = 1.0) -> list[Tensor]:
    """One sequence at a time, by transformers alone."""
    lm.eval()
    found = []
    for rollout in ROLLOUTS:
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids])
        logits = lm(ids[None]).logits[0, len(rollout.prompt_ids) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1).gather(-1, rollout.response_ids[:, None])[:, 0])
    return found


def plain(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


MERGED = 5e-5
"""W + BA is rounded once more than Wx + BAx: two or three units in the last place of logits of about 10."""


def assert_close(a: list[Tensor], b: list[Tensor], atol: float = 1e-5) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


def differ(a: list[Tensor], b: list[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(a, b, strict=True))


def moved(policy: Policy, seed: int = 1, scale: float = 0.03) -> None:
    """Away from where it was, in every trained parameter of the policy: B of a LoRA is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if parameter.requires_grad and name.startswith("lm."):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def bits(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_unchanged(module: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def batch_of(ids: Tensor, mask: Tensor) -> Batch:
    zero = torch.zeros(mask.shape)
    return Batch(ids, mask, zero, zero, zero, zero, torch.zeros(len(ids), dtype=torch.long))
