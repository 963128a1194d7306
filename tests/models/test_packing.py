"""Packed rows against padded sequences: the same numbers and gradients from fewer tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from remix.models.actor_critic import PolicyOutput
from remix.models.loading import load_actor_critic, load_processor, load_tokenizer
from remix.models.packing import Packed, pack, packed_microbatches
from remix.models.policy import Policy, token_tensors
from remix.models.vision import Vision
from remix.tasks import encode
from remix.tracking.run_log import read_metrics
from remix.training.packable import start_packing
from remix.types import Prompt, Rollout
from tests.tiny import MIX, make_tiny_vision_model, opened, tiny_recipe


def response(prompt: Sequence[int], length: int, seed: int, images: tuple[str, ...] = ()) -> Rollout:
    tokens = torch.randint(3, 20, (length,), generator=torch.Generator().manual_seed(seed))
    return Rollout(
        prompt_ids=torch.tensor(prompt),
        response_ids=tokens,
        sampler_logprobs=torch.zeros(length),
        policy_version=0,
        finish_reason="length",
        seed=seed,
        text="",
        images=images,
    )


LONG, SHORT, OTHER = [4, 7, 9, 11, 5], [6, 8], [9, 3]
ROLLOUTS = [
    response(prompt, length, seed)
    for seed, (prompt, length) in enumerate(
        [(LONG, 3), (SHORT, 7), (LONG, 1), (OTHER, 4), (SHORT, 2), (LONG, 6), (OTHER, 1), ([5], 1)]
    )
]


def policy_of(path: Path, tmp_path: Path, /, **changes: Any) -> Policy:
    recipe = tiny_recipe(path, tmp_path, changes)
    processor = load_processor(recipe.model, needed=False)
    tokenizer = load_tokenizer(recipe.model, processor)
    torch.manual_seed(0)
    module = load_actor_critic(recipe, tokenizer, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "value_head" in name):
                parameter.normal_(std=0.1)  # or half of the gradients would be 0
    vision = None if processor is None else Vision(processor, module.lm)
    return Policy(module, tokenizer, device=torch.device("cpu"), temperature=0.8, vision=vision)


def prompts_of(*prompts: Sequence[int]) -> list[Prompt]:
    return [Prompt(str(i), "", "", "task", tuple(prompt)) for i, prompt in enumerate(prompts)]


def packing_refused(policy: Policy, prompts: Sequence[Prompt]) -> str | None:
    return start_packing(policy, prompts, tokens_per_microbatch=40, longest=100)


def run(policy: Policy, rollouts: Sequence[Rollout], *, packs: bool) -> tuple[PolicyOutput, dict[str, Tensor]]:
    """Its output and the gradients of something that depends on all of it."""
    policy.packs = packs
    policy.module.zero_grad()
    policy.module.train()
    ids, mask = token_tensors(rollouts)
    output = policy.module(ids, mask, 0.8, multimodal=policy.multimodal(rollouts), packed=policy.packed(rollouts))
    values = [] if output.values is None else [output.values]
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    sum((weights * part).sum() for part in (output.logprobs, output.entropy, *values)).backward()
    return output, {n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None}


def assert_same(policy: Policy, rollouts: Sequence[Rollout]) -> None:
    (one, gradients), (other, others) = (run(policy, rollouts, packs=packs) for packs in (False, True))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(others[name], gradient, atol=2e-5 * max(1.0, largest), rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": {"type": "lora", "rank": 4}},
        {"adapter": {"type": "layers", "last_blocks": 1, "head": True}},
        {"advantage": {"type": "gae"}},
        {"advantage": {"type": "gae", "critic": {"type": "separate"}}},
        {"model": {"gradient_checkpointing": True}},
    ],
    ids=["full", "lora", "layers", "shared critic", "separate critic", "checkpointing"],
)
def test_numbers_and_gradients_are_those_of_padded_sequences(
    tiny_untied_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes["model"] = {"path": str(tiny_untied_model), **changes.get("model", {})}
    policy = policy_of(tiny_untied_model, tmp_path, **changes)
    assert packing_refused(policy, prompts_of(LONG, SHORT)) is None
    assert policy.packs
    assert_same(policy, ROLLOUTS)


def test_images_are_computed_once_for_a_prompt(tiny_vision_model: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_vision_model, tmp_path)
    assert policy.vision is not None
    recipe = tiny_recipe(tiny_vision_model, tmp_path, {})
    asked = [
        Prompt(str(i), text, "", "task", images=(f"shapes:colour/train/0/{i}",))
        for i, text in enumerate(("1+2=", "<image>3+4+5="))
    ]
    prompts = encode(asked, policy.tokenizer, recipe.prompt, policy.vision.processor)
    assert packing_refused(policy, prompts) is None
    rollouts = [
        response(prompts[i].token_ids, length, seed, prompts[i].images)
        for seed, (i, length) in enumerate([(0, 3), (1, 4), (0, 5), (1, 1)])
    ]
    assert_same(policy, rollouts)
    policy.packs = True
    assert policy.multimodal(rollouts)["pixel_values"].shape[0] == 2
    policy.packs = False
    assert policy.multimodal(rollouts)["pixel_values"].shape[0] == 4


def test_models_that_cannot_have_it_are_padded_and_say_why(tiny_model: Path, tmp_path: Path) -> None:
    eager = policy_of(tiny_model, tmp_path, model={"path": str(tiny_model), "attn_implementation": "eager"})
    virtual = policy_of(tiny_model, tmp_path, adapter={"type": "prefix", "tokens": 2})
    both_ways = policy_of(make_tiny_vision_model(tmp_path / "paligemma", family="paligemma"), tmp_path)
    for policy, why in ((eager, "not sdpa"), (virtual, "virtual tokens"), (both_ways, "tells tokens of images")):
        assert why in str(packing_refused(policy, prompts_of(LONG, SHORT)))
        assert not policy.packs
        policy.score(ROLLOUTS, tokens_per_microbatch=50)


def test_a_model_that_gives_other_numbers_is_padded(tiny_model: Path, tmp_path: Path) -> None:
    """Positions are taken for granted by some families; here they are lost on the way."""
    policy = policy_of(tiny_model, tmp_path)
    backbone = policy.module.backbones[0]
    forward = backbone.forward
    backbone.forward = lambda position_ids=None, **inputs: forward(**inputs)
    assert "other log-probs" in str(packing_refused(policy, prompts_of(LONG, SHORT)))
    assert not policy.packs


def test_a_window_narrower_than_the_sequences_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_model, tmp_path)
    for layer in policy.module.backbones[0].layers:
        layer.self_attn.sliding_window = 4
    assert "sliding_window" in str(packing_refused(policy, prompts_of(LONG, SHORT)))


def test_the_row_by_hand() -> None:
    """Prompts (6 8) and (9 3) of two tokens with 3 and 1 + 2 response tokens, of which the last is left out."""
    rollouts = [response([9, 3], 1, 0), response([6, 8], 3, 1), response([9, 3], 2, 2)]
    row: Packed = pack(rollouts)
    first, second, third = (r.response_ids.tolist() for r in rollouts)
    # Families in the order of their first: (9 3) with the responses 0 and 2, then (6 8) with 1.
    assert row.input_ids[0].tolist() == [9, 3, 6, 8, third[0], *second[:2]]
    assert row.positions[0].tolist() == [0, 1, 0, 1, 2, 2, 3]
    assert row.labels.tolist() == [*first, *second, *third]
    assert row.before.tolist() == [1, 3, 5, 6, 1, 4]
    (block,) = row.blocks
    assert (block.start, block.prompts, block.first_response) == (0, (2, 2), 4)
    assert block.prompt_of.tolist() == [0, 1]
    assert block.places.tolist() == [[0, 0], [1, 2]]
    assert block.inside.tolist() == [[True, False], [True, True]]


def test_a_prompt_is_counted_once_in_a_microbatch() -> None:
    """A prompt of 512 with 8 responses of 64: 512 + 8·63 tokens of a row against 8·576 padded ones, 4.5 times fewer."""
    prompt = list(range(512))
    group = [response(prompt, 64, seed) for seed in range(8)]
    assert pack(group).input_ids.shape == (1, 512 + 8 * 63)
    assert list(packed_microbatches(group, 512 + 8 * 63)) == [list(range(8))]
    assert [len(part) for part in packed_microbatches(group, 512 + 3 * 63)] == [3, 3, 2]
    assert [len(part) for part in packed_microbatches(group, 1)] == [1] * 8


def test_every_response_is_in_one_microbatch() -> None:
    parts = list(packed_microbatches(ROLLOUTS, 12))
    assert sorted(i for part in parts for i in part) == list(range(len(ROLLOUTS)))
    for part in parts:
        assert pack([ROLLOUTS[i] for i in part]).input_ids.shape[1] <= 12


def test_a_run_learns_the_same_packed_and_padded(tiny_model: Path, tmp_path: Path) -> None:
    """Two steps of replay, reference and precedent: the same rollouts, and losses and gradients up to rounding."""
    lines = []
    for pack_ in (True, False):
        # AdamW takes whole steps by what is rounding in a gradient near 0, unless eps is beyond that.
        optimizer = {"lr": 1e-3, "eps": 1e-2}
        changes = {"steps": 3, "phases": MIX, "kl": {"weight": 0.1}, "batch": {"pack": pack_}, "optimizer": optimizer}
        recipe = tiny_recipe(tiny_model, tmp_path / str(pack_), changes)
        with opened(recipe) as trainer:
            assert trainer.policy.packs is pack_
            trainer.fit()
        lines.append(read_metrics(Path(recipe.run_dir)))
    packed, padded = lines
    assert len(packed) == 3
    for one, other in zip(packed, padded, strict=True):
        for name in ("reward/mean", "loss/policy", "loss/kl", "grad_norm/policy", "entropy", "ratio/mean"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_attention_that_reaches_less_far_than_sequences_may_is_refused(
    tiny_model: Path, tmp_path: Path, key: str
) -> None:
    """Whatever the prompts that are tried: responses may be longer."""
    policy = policy_of(tiny_model, tmp_path)
    setattr(policy.module.backbones[0].config, key, 99)
    assert "reaches back 99 tokens, and sequences may have 100" in str(packing_refused(policy, prompts_of(LONG, SHORT)))
    setattr(policy.module.backbones[0].config, key, 100)
    assert packing_refused(policy, prompts_of(LONG, SHORT)) is None
