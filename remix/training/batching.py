"""Samples side by side as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from remix.models.packing import Packed, families
from remix.models.policy import token_tensors
from remix.types import Batch, Rollout, Sample


def collate(
    samples: Sequence[Sample],
    device: torch.device,
    multimodal: Mapping[str, Tensor] = MappingProxyType({}),
    packed: Packed | None = None,
) -> Batch:
    """[R] tensors of each sample into right-padded [B, T], zero outside the response.

    `multimodal`, `packed`: of the model's forward on these sequences, as `Policy` makes them. Log-probs of the proximal
    policy that are not known yet are 0, and those of the behaviour policy where it is the same one: see `begun_by`.
    """
    input_ids, response_mask = token_tensors([sample.rollout for sample in samples])

    def scattered(field: Callable[[Sample], Tensor | None]) -> Tensor | None:
        """Rows of the mask are filled in order, so the responses one after the other land in their places."""
        rows = [field(sample) for sample in samples]
        present = [row for row in rows if row is not None]
        if not present:
            return None
        assert len(present) == len(rows), "a quantity is known for every sample of a batch or for none"
        full = torch.zeros(response_mask.shape).masked_scatter(response_mask, torch.cat(present))
        return full.to(device)

    def or_zero(known: Tensor | None, sample: Sample) -> Tensor:
        return torch.zeros(sample.num_tokens) if known is None else known

    def required(field: Callable[[Sample], Tensor | None]) -> Tensor:
        tensor = scattered(field)
        assert tensor is not None
        return tensor

    return Batch(
        input_ids=input_ids.to(device),
        response_mask=response_mask.to(device),
        advantages=required(lambda s: s.advantages),
        behaviour_logprobs=required(lambda s: or_zero(s.rollout.behaviour_logprobs, s)),
        proximal_logprobs=required(lambda s: or_zero(s.proximal_logprobs, s)),
        sampler_logprobs=required(lambda s: s.rollout.sampler_logprobs),
        policy_lag=torch.tensor([sample.policy_lag for sample in samples], device=device),
        reference_logprobs=scattered(lambda s: s.rollout.reference_logprobs),
        precedent_logprobs=scattered(lambda s: s.precedent_logprobs),
        values=scattered(lambda s: s.values),
        returns=scattered(lambda s: s.returns),
        multimodal=multimodal,
        packed=packed,
    )


def begun_by(batch: Batch, logprobs_BT: Tensor) -> Batch:
    """The batch of which the policy as the step begins says these log-probs: proximal, and behaviour at lag 0."""
    fresh_B1 = batch.policy_lag[:, None] == 0
    behaviour_BT = torch.where(fresh_B1, logprobs_BT, batch.behaviour_logprobs)
    return replace(batch, proximal_logprobs=logprobs_BT, behaviour_logprobs=behaviour_BT)


def shared_prompts(rollouts: Sequence[Rollout], parts: int = 1) -> list[list[int]]:
    """Indices of responses to one prompt together, as what is computed of it is shared; of fewer prompts than `parts`
    each response by itself, so that no part is empty."""
    found = families(rollouts)
    return found if len(found) >= parts else [[index] for family in found for index in family]


def cost(rollouts: Sequence[Rollout]) -> int:
    """Tokens of a forward over responses to one prompt."""
    return len(rollouts[0].prompt_ids) + sum(len(rollout.response_ids) for rollout in rollouts)
