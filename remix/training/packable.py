"""Whether a model can have packed sequences: seen, not believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from remix.errors import first_line
from remix.models.adapters import has_virtual_tokens
from remix.models.packing import allow_packing, attention_reach
from remix.models.policy import Policy, TokenScores, token_tensors
from remix.types import Prompt, Rollout

FLEX_DEVICES = ("cuda",)
"""Where FlexAttention is one compiled kernel, forward and backward."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Most that a log-prob may differ, in nats, by the dtype of the forward. A token in a wrong place differs by more."""


def start_packing(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    tokens_per_microbatch: int,
    longest: int,
    message: Callable[[str], None] = lambda _: None,
) -> str | None:
    """Makes the policy pack its sequences if the model gives them the log-probs that it gives padded ones.

    Else says why it does not. `prompts`: of the run, encoded; some of them are tried with responses of random tokens.
    `longest`: most tokens of a prompt and its response, which are more than those that are tried. On a GPU
    FlexAttention is tried first, and `message` told if it will not do.
    """
    policy.packs = policy.flex = False
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
    with torch.compiler.set_stance("force_eager"):  # a run that packs has no use for compiled blocks that pad
        padded = policy.score(tried, tokens_per_microbatch=tokens_per_microbatch)
    if policy.device.type in FLEX_DEVICES:
        refused = _refused(policy, tried, padded, tokens_per_microbatch, flex=True)
        if refused is None:
            return None
        message(f"packed rows are attended to block by block, not by FlexAttention: {refused}")
    return _refused(policy, tried, padded, tokens_per_microbatch, flex=False)


def _refused(
    policy: Policy, tried: Sequence[Rollout], padded: Sequence[TokenScores], tokens_per_microbatch: int, *, flex: bool
) -> str | None:
    """Why the policy is not to pack this way; None, and it does, where it can."""
    kind, tolerance = policy.module.lm.config.model_type, TOLERANCE[policy.module.autocast_dtype or torch.float32]
    policy.packs, policy.flex = True, flex
    try:
        packed = policy.score(tried, tokens_per_microbatch=tokens_per_microbatch)
        apart = _gradients_apart(policy, tried) if flex else 0.0
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, ImportError) as error:
        policy.packs = policy.flex = False  # whatever a family or compiler makes of inputs that it was not made for
        return f"models of type {kind} do not take it ({first_line(error)})"
    worst = max((a.logprobs - b.logprobs).abs().max().item() for a, b in zip(padded, packed, strict=True))
    if worst <= tolerance and apart <= tolerance:
        return None
    policy.packs = policy.flex = False
    other = f"log-probs (by {worst:.2g} nats)" if worst > tolerance else f"gradients (by {apart:.2g} of them)"
    return f"models of type {kind} then have other {other}"


def _gradients_apart(policy: Policy, tried: Sequence[Rollout]) -> float:
    """How far gradients by FlexAttention, whose backward is a kernel of its own, are from those block by block."""
    parameters = [p for name, p in policy.module.named_parameters() if p.requires_grad and name.startswith("lm.")]
    smallest = min(parameters, key=lambda parameter: parameter.numel())  # the first of them: below all attention

    def gradient() -> Tensor:
        ids, mask = (tensor.to(policy.device) for tensor in token_tensors(tried))
        output = policy.module(ids, mask, policy.temperature, (), False, policy.multimodal(tried), policy.packed(tried))
        (found,) = torch.autograd.grad(output.logprobs.sum(), smallest)
        return found

    by_flex = gradient()
    policy.flex = False
    by_block = gradient()
    policy.flex = True
    return float((by_flex - by_block).norm() / by_block.norm().clamp(min=1e-12))


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
