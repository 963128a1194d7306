"""Position t of a [B, T] tensor speaks of the token `input_ids[:, t + 1]`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from remix.models.policy import microbatches, token_tensors
from remix.training.batching import collate
from remix.types import Rollout, Sample

CPU = torch.device("cpu")


def made(prompt: list[int], response: list[int], **known: Tensor) -> Rollout:
    return Rollout(
        prompt_ids=torch.tensor(prompt),
        response_ids=torch.tensor(response),
        sampler_logprobs=-torch.tensor(response) / 10,
        policy_version=3,
        finish_reason="stop",
        seed=0,
        text="",
        **known,
    )


def sample(prompt: list[int], response: list[int], *, lag: int = 0, **others: Any) -> Sample:
    """Every quantity is the token it speaks of, in its own thousand."""
    tokens = torch.tensor(response, dtype=torch.float32)
    rollout = made(prompt, response, behaviour_logprobs=2000 + tokens, reference_logprobs=4000 + tokens)
    return Sample(rollout, lag, advantages=1000 + tokens, proximal_logprobs=3000 + tokens, **others)


def test_hand_made() -> None:
    # Prompts of 2 and 1 tokens, responses of 2 and 4: sequences of 4 and 5, S = 5, T = 4.
    batch = collate([sample([11, 12], [13, 14], lag=2), sample([21], [22, 23, 24, 25])], CPU)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 0], [21, 22, 23, 24, 25]]
    # The token after place 0 is 12, a prompt's; after place 1 it is 13, the first of the response.
    assert batch.response_mask.tolist() == [[False, True, True, False], [True, True, True, True]]
    assert batch.advantages.tolist() == [[0, 1013, 1014, 0], [1022, 1023, 1024, 1025]]
    assert batch.behaviour_logprobs.tolist() == [[0, 2013, 2014, 0], [2022, 2023, 2024, 2025]]
    assert batch.proximal_logprobs.tolist() == [[0, 3013, 3014, 0], [3022, 3023, 3024, 3025]]
    assert batch.reference_logprobs is not None
    assert batch.reference_logprobs.tolist() == [[0, 4013, 4014, 0], [4022, 4023, 4024, 4025]]
    assert torch.allclose(batch.sampler_logprobs, torch.tensor([[0, -1.3, -1.4, 0], [-2.2, -2.3, -2.4, -2.5]]))
    assert batch.policy_lag.tolist() == [2, 0]
    assert batch.policy_lag.dtype == torch.int64
    assert batch.precedent_logprobs is None
    assert batch.values is None
    assert batch.returns is None


def test_every_quantity_stands_before_the_token_it_speaks_of() -> None:
    samples = [sample(list(range(1, 1 + p)), list(range(50, 50 + r))) for p, r in [(1, 1), (3, 7), (6, 2), (2, 5)]]
    batch = collate(samples, CPU)
    following = batch.input_ids[:, 1:]
    assert torch.equal(batch.advantages[batch.response_mask] - 1000, following[batch.response_mask].float())
    assert batch.response_mask.sum(1).tolist() == [1, 7, 2, 5]
    assert (batch.advantages[~batch.response_mask] == 0).all()


def test_optional_quantities_land_in_their_places() -> None:
    extra = {"precedent_logprobs": torch.tensor([-7.0]), "values": torch.tensor([0.5]), "returns": torch.tensor([0.25])}
    batch = collate([sample([1, 2, 3], [4], **extra)], CPU)
    assert batch.precedent_logprobs is not None
    assert batch.values is not None
    assert batch.returns is not None
    assert batch.precedent_logprobs.tolist() == [[0, 0, -7.0]]
    assert batch.values.tolist() == [[0, 0, 0.5]]
    assert batch.returns.tolist() == [[0, 0, 0.25]]


def test_a_quantity_known_of_some_samples_is_a_mistake() -> None:
    some = [sample([1], [2], values=torch.tensor([0.5])), sample([1], [2])]
    with pytest.raises(AssertionError, match="for every sample of a batch or for none"):
        collate(some, CPU)


def test_token_tensors_of_one() -> None:
    ids, mask = token_tensors([made([5], [6])])
    assert ids.tolist() == [[5, 6]]
    assert mask.tolist() == [[True]]


def test_microbatches_by_hand() -> None:
    # Longest first: 5, 4, 3, 2. Two of width 5 take 10; a third would take 15. Then 3, 2 in width 3.
    assert list(microbatches([3, 5, 2, 4], 10)) == [[1, 3], [0, 2]]
    assert list(microbatches([3, 5, 2, 4], 15)) == [[1, 3, 0], [2]]
    assert list(microbatches([3, 5, 2, 4], 20)) == [[1, 3, 0, 2]]
    # Longer than the budget: alone.
    assert list(microbatches([9, 1, 1], 4)) == [[0], [1, 2]]
    assert list(microbatches([], 4)) == []


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_microbatches_are_a_partition_within_the_budget(budget: int) -> None:
    lengths = [1 + (7 * i) % 11 for i in range(23)]
    groups = list(microbatches(lengths, budget))
    assert sorted(index for group in groups for index in group) == list(range(23))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
