"""Whether a model can have packed sequences: seen, not believed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from remix.errors import first_line
from remix.models.adapters import has_virtual_tokens
from remix.models.packing import allow_packing, attention_reach
from remix.models.policy import Policy
from remix.types import Prompt, Rollout

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Most that a log-prob may differ, in nats, by the dtype of the forward. A token in a wrong place differs by more."""


def start_packing(policy: Policy, prompts: Sequence[Prompt], *, tokens_per_microbatch: int, longest: int) -> str | None:
    """Makes the policy pack its sequences if the model gives them the log-probs that it gives padded ones.

    Else says why it does not. `prompts`: of the run, encoded; some of them are tried with responses of random tokens.
    `longest`: most tokens of a prompt and its response, which are more than those that are tried.
    """
    policy.packs = False
    module = policy.module
    if has_virtual_tokens(module.lm):
        return "the adapter's virtual tokens stand before every sequence"
    if policy.vision is not None and policy.vision.has_token_types:
        return "the model tells tokens of images from those of text, which may see one another"
    if not all(map(allow_packing, module.backbones)):
        return "model.attn_implementation is not sdpa"
    reach = min(filter(None, map(attention_reach, module.backbones)), default=longest)
    if reach < longest:
        return f"the model's attention reaches back {reach} tokens, and sequences may have {longest}"
    tried = _responses(policy, prompts)
    padded = policy.score(tried, tokens_per_microbatch=tokens_per_microbatch)
    try:
        policy.packs = True
        packed = policy.score(tried, tokens_per_microbatch=tokens_per_microbatch)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        policy.packs = False  # whatever a family makes of inputs that it was not made for
        return f"models of type {module.lm.config.model_type} do not take it ({first_line(error)})"
    worst = max((a.logprobs - b.logprobs).abs().max().item() for a, b in zip(padded, packed, strict=True))
    policy.packs = worst <= TOLERANCE[module.autocast_dtype or torch.float32]
    if policy.packs:
        return None
    return f"models of type {module.lm.config.model_type} then have other log-probs (by {worst:.2g} nats)"


def _responses(policy: Policy, prompts: Sequence[Prompt]) -> list[Rollout]:
    """Three to each of some prompts, of several lengths and with images where there are some."""
    shown = [prompt for prompt in prompts if prompt.images][:2] + [p for p in prompts if not p.images][:2]
    by_length = {len(prompt.token_ids): prompt for prompt in prompts}
    shown += [by_length[min(by_length)], by_length[max(by_length)]]
    generator = torch.Generator().manual_seed(0)
    vocabulary = policy.module.lm.config.get_text_config().vocab_size
    allowed = torch.tensor([token for token in range(vocabulary) if token not in policy.module.never])
    return [
        Rollout(
            prompt_ids=torch.tensor(prompt.token_ids),
            response_ids=allowed[torch.randint(len(allowed), (length,), generator=generator)],
            sampler_logprobs=torch.zeros(length),
            policy_version=0,
            finish_reason="length",
            seed=0,
            text="",
            images=prompt.images,
        )
        for prompt in shown
        for length in (3, 1, 6)
    ]
