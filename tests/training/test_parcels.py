"""What ranks send each other arrives as it was, bit for bit."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from remix.models.policy import TokenScores
from remix.training.parcels import ALIGNMENT, DTYPES, put_together, take_apart
from remix.types import Rollout, RolloutGroup
from tests.test_replay import assert_same, full_group, group


def there_and_back(value: Any) -> Any:
    parcel, array = take_apart(value)
    assert len(array) == parcel.num_bytes
    longer = torch.cat([array, torch.full((13,), 255, dtype=torch.uint8)])  # as where another rank sends more
    back = put_together(parcel, longer)
    longer.zero_()
    return back


def test_rollouts_arrive_bit_for_bit() -> None:
    sent: list[RolloutGroup | None] = [full_group(), None, group(3, 1, size=3)]
    back = there_and_back(sent)
    assert back[1] is None
    for before, after in ((sent[0], back[0]), (sent[2], back[2])):
        assert before is not None
        assert_same(before, after)
    names = {f.name for f in fields(Rollout) if isinstance(getattr(full_group().rollouts[0], f.name), Tensor)}
    assert len(names) == 7, "every tensor of a rollout has been there"
    assert not any(
        isinstance(getattr(r, n), Tensor) for g in take_apart([sent[0]])[0].value for r in g.rollouts for n in names
    )


def test_every_dtype_and_what_is_no_row_of_numbers() -> None:
    odd = {
        "scores": [[TokenScores(torch.tensor([0.5]), None)], [TokenScores(torch.zeros(0), torch.tensor([1e-45]))]],
        "rng": {str(dtype): torch.arange(3).to(dtype) for dtype in DTYPES},
        "in the parcel": (torch.zeros(2, 2), torch.tensor(7.0), torch.tensor([1.0], dtype=torch.bfloat16), 3, "text"),
        "a part of another": torch.arange(10)[3:9:2],
    }
    back = there_and_back(odd)
    assert isinstance(back["scores"][0][0], TokenScores)
    assert back["scores"][0][0].values is None
    assert back["scores"][1][0].logprobs.shape == (0,)
    assert back["scores"][1][0].values.item() == torch.tensor(1e-45).item() > 0
    for dtype in DTYPES:
        assert torch.equal(back["rng"][str(dtype)], odd["rng"][str(dtype)])  # type: ignore[call-overload]
        assert back["rng"][str(dtype)].dtype == dtype
    assert back["in the parcel"][3:] == (3, "text")
    assert [tuple(tensor.shape) for tensor in back["in the parcel"][:3]] == [(2, 2), (), (1,)]
    assert back["a part of another"].tolist() == [3, 5, 7]


def test_a_prompt_is_sent_once_for_its_group() -> None:
    prompt, responses = torch.arange(1000), [torch.arange(5), torch.arange(4)]
    parcel, array = take_apart([(prompt, response) for response in responses])
    assert len(array) == 8 * (1000 + 5 + 4)
    back = put_together(parcel, array)
    assert back[0][0] is back[1][0]
    assert torch.equal(back[1][0], prompt)


def test_nothing_is_sent_of_what_holds_no_tensors() -> None:
    parcel, array = take_apart({"loss": 1.5, "names": ["a"]})
    assert (parcel.num_bytes, len(array)) == (0, 0)
    assert put_together(parcel, array) == {"loss": 1.5, "names": ["a"]}


def test_arrays_of_several_ranks_behind_one_another() -> None:
    values = [{"x": torch.tensor([1, 2, 3], dtype=torch.uint8)}, {"y": torch.tensor([1.5], dtype=torch.float64)}, {}]
    apart = [take_apart(value) for value in values]
    width = -(-max(parcel.num_bytes for parcel, _ in apart) // ALIGNMENT) * ALIGNMENT
    assert width == 8
    rows = torch.stack([torch.nn.functional.pad(array, (0, width - len(array))) for _, array in apart])
    back = [put_together(parcel, row) for (parcel, _), row in zip(apart, rows, strict=True)]
    assert [{name: tensor.tolist() for name, tensor in of.items()} for of in back] == [
        {"x": [1, 2, 3]},
        {"y": [1.5]},
        {},
    ]
    assert [tensor.dtype for of in back for tensor in of.values()] == [torch.uint8, torch.float64]
    assert put_together(apart[2][0], torch.empty(3, 0, dtype=torch.uint8)[1]) == {}
