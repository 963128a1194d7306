"""FlexAttention of packed rows against attention block by block: the same numbers and gradients."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torchs

from remix.models.flex import SIZE, spans, tree_mask
from remix.models.packing import Packed, Row, pack, packed_attention
from remix.training import packable
from remix.types import Rollout
from tests.models.test_packing import LONG, ROLLOUTS, SHORT, policy_of, prompts_of, response, run

CPU = torch.device("cpu")
WIDE = [
    response(list(range(prompt)), length, seed)
    for seed, (prompt, length) in enumerate([(300, 7), (300, 290), (300, 140), (5, 200), (130, 1), (130, 2)])
]
"""Rows of several tiles, with prompts that end amid one, and a response that covers whole ones."""


@pytest.fixture(autouse=True)
def backward_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch refuses gradients of FlexAttention on a CPU, where its unfused form has them all the same."""
    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)
    yield
    torch.compiler.reset()


def seen(rollouts: list[Rollout]) -> torch.Tensor:
    """[L, L], by walking through the sequences: a token sees its prompt, and its response up to itself."""
    row = pack(rollouts)
    length = row.input_ids.shape[1]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for block in row.blocks:
        (count, size), start = block.prompts, block.start
        for number in range(count):
            begin = start + number * size
            allowed[begin : begin + size, begin : begin + size] = torch.ones(size, size, dtype=torch.bool).tril()
        for prompt, places, inside in zip(block.prompt_of, block.places, block.inside, strict=True):
            own = block.first_response + places[inside]
            begin = start + int(prompt) * size
            for index, place in enumerate(own):
                allowed[place, begin : begin + size] = True
                allowed[place, own[: index + 1]] = True
    return allowed


@pytest.mark.parametrize("rollouts", [ROLLOUTS, WIDE, WIDE[4:5], WIDE[1:2]], ids=["short", "wide", "prompt", "one"])
def test_the_mask_is_the_tree(rollouts: list[Rollout]) -> None:
    """Place by place, and tile by tile: nothing seen is skipped, and a tile taken whole is seen whole."""
    allowed = seen(rollouts)
    length = len(allowed)
    mask = tree_mask(pack(rollouts).blocks, CPU)
    places = torch.arange(length)
    assert torch.equal(mask.mask_mod(None, None, places[:, None], places[None]), allowed)  # type: ignore[arg-type]
    tiles = -(-length // SIZE)
    room = torch.zeros(tiles * SIZE, tiles * SIZE, dtype=torch.bool)
    room[:length, :length] = allowed
    by_tile = room.view(tiles, SIZE, tiles, SIZE).transpose(1, 2)
    partly, wholly = (
        torch.stack(
            [torch.zeros(tiles).index_fill(0, which[:many].long(), 1) for many, which in zip(*listed, strict=True)]
        ).bool()
        for listed in (
            (mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0]),
            (mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0]),  # type: ignore[index]
        )
    )
    assert not (partly & wholly).any()
    assert torch.equal(partly | wholly, by_tile.any(-1).any(-1))
    assert (by_tile.all(-1).all(-1) | ~wholly).all()
    if rollouts is WIDE:
        assert wholly.any()


def test_no_row_of_the_mask_is_larger_than_its_spans() -> None:
    first, end, own = spans(pack(WIDE).blocks)
    assert len(first) == len(end) == len(own) == pack(WIDE).input_ids.shape[1]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_with_shared_keys_scale_and_softcap(softcap: float | None) -> None:
    """4 heads of queries to 2 of keys, against a softmax over all pairs that are allowed; with gradients."""
    row = pack(WIDE).to(CPU, masked=True)
    length = row.input_ids.shape[1]
    torch.manual_seed(0)
    given = [torch.randn(1, heads, length, 16, requires_grad=True) for heads in (4, 2, 2)]
    module = SimpleNamespace(training=True)
    by_flex, _ = packed_attention(module, *given, None, packed=Row(row), scaling=0.4, softcap=softcap)
    query, key, value = given[0], *(tensor.repeat_interleave(2, 1) for tensor in given[1:])
    scores = query @ key.transpose(2, 3) * 0.4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    by_hand = (scores.masked_fill(~seen(WIDE), -torch.inf).softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(by_flex, by_hand, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(by_hand)
    ours, theirs = (torch.autograd.grad((weights * found).sum(), given) for found in (by_flex, by_hand))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    if softcap is None:
        blocks, _ = packed_attention(module, *given, None, packed=Row(row._replace(mask=None)), scaling=0.4)
        torch.testing.assert_close(by_flex, blocks, atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="softcap"):
            packed_attention(module, *given, None, packed=Row(row._replace(mask=None)), softcap=softcap)


@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter": {"type": "lora", "rank": 4}, "model": {"gradient_checkpointing": True}}],
    ids=["full", "lora, checkpointing"],
)
def test_a_model_gives_the_same_numbers_and_gradients(
    tiny_untied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(packable, "FLEX_DEVICES", ("cpu",))
    changes["model"] = {"path": str(tiny_untied_model), **changes.get("model", {})}
    policy = policy_of(tiny_untied_model, tmp_path, **changes)
    assert packable.start_packing(policy, prompts_of(LONG, SHORT), tokens_per_microbatch=40, longest=100) is None
    assert policy.packs
    assert policy.flex
    one, gradients = run(policy, ROLLOUTS, packs=True)
    policy.flex = False
    other, others = run(policy, ROLLOUTS, packs=True)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-5, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(others[name], gradient, atol=2e-5 * max(1.0, largest), rtol=1e-4)


def test_bfloat16_takes_the_precision_of_the_forward() -> None:
    """Queries of a family that normalises them are float32 under autocast, its values are not."""
    row = pack(ROLLOUTS).to(CPU, masked=True)
    torch.manual_seed(0)
    given = [torch.randn(1, heads, row.input_ids.shape[1], 16) for heads in (4, 2, 2)]
    given[2] = given[2].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_flex, by_block = (
            packed_attention(SimpleNamespace(training=True), *given, None, packed=Row(packed))[0]
            for packed in (row, row._replace(mask=None))
        )
    assert by_flex.dtype == by_block.dtype == torch.bfloat16
    torch.testing.assert_close(by_flex, by_block, atol=0.03, rtol=0.03)


def test_where_flex_attention_fails_rows_are_attended_to_block_by_block(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # torch's own refusal of gradients on a CPU is back
    monkeypatch.setattr(packable, "FLEX_DEVICES", ("cpu",))
    policy = policy_of(tiny_model, tmp_path)
    told = list[str]()
    refused = packable.start_packing(
        policy, prompts_of(LONG, SHORT), tokens_per_microbatch=40, longest=100, message=told.append
    )
    assert refused is None
    assert policy.packs
    assert not policy.flex
    (words,) = told
    assert "not by FlexAttention" in words
    assert "does not support backward on CPU" in words


def test_on_a_cpu_it_is_not_tried(tiny_model: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_model, tmp_path)
    assert packable.start_packing(policy, prompts_of(LONG, SHORT), tokens_per_microbatch=40, longest=100) is None
    packed = policy.packed(ROLLOUTS)
    assert isinstance(packed, Packed)
    assert packed.mask is None
