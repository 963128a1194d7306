"""Images in the model: whatever the family, the trainer's log-probs are those of the model's own generation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from remix.config import ModelConfig, PromptConfig
from remix.models import vision as vision_module
from remix.models.actor_critic import ActorCritic
from remix.models.adapters import checkpoint_weights, save_model
from remix.models.loading import (
    load_actor_critic,
    load_lm,
    load_processor,
    load_tokenizer,
    placeholder_ids,
    sees_images,
)
from remix.models.policy import Policy, token_tensors
from remix.models.vision import Vision
from remix.rollout.hf import HFEngine
from remix.tasks import encode
from remix.types import Batch, Completion, Prompt, Request, Rollout, Sampling
from tests.models.vision_families import FAMILIES, lively
from tests.tiny import tiny_recipe

CPU = torch.device("cpu")
LORA = {"type": "lora", "rank": 4, "alpha": 8}
SIZES = [(16, 24), (20, 20), (40, 16), (16, 16)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for colour, size in zip(("red", "green", "blue", "white"), SIZES, strict=True):
        picture = Image.new("RGB", size, colour)
        picture.paste("black", (3, 2, 9, 11))
        paths.append(str(folder / f"{colour}.png"))
        picture.save(paths[-1])
    return paths


def problems(pictures: list[str], processor: Any, *, alike: bool = False) -> list[Prompt]:
    """With one picture, two of other sizes, and none; `alike`: one picture each, as some families demand."""
    one, two, three, four = pictures
    prompts = [
        Prompt("one", "3+4=", "7", "sums", images=(one,)),
        Prompt("same", "1+1+1+1=", "4", "sums", images=(four,)),
        Prompt("two", "<image>3+<image>4=", "7", "sums", images=(two, three)),
        Prompt("none", "1+1=", "2", "sums"),
    ]
    return encode(prompts[:2] if alike else prompts, processor.tokenizer, PromptConfig(), processor)


def policy_of(path: Path, **changes: Any) -> Policy:
    recipe = tiny_recipe(path, Path("unused"), changes)
    processor = load_processor(recipe.model, needed=True)
    tokenizer = load_tokenizer(recipe.model, processor)
    module = load_actor_critic(recipe, tokenizer, CPU)
    return Policy(module, tokenizer, device=CPU, temperature=1.0, vision=Vision(processor, module.lm))


def engine_of(policy: Policy, batch_size: int = 64) -> HFEngine:
    return HFEngine(
        policy.module.lm,
        eos_token_ids=policy.module.eos_token_ids,
        batch_size=batch_size,
        device=CPU,
        autocast=lambda: policy.module.autocast(CPU),
        never=policy.module.never,
        vision=policy.vision,
    )


def as_rollout(request: Request, completion: Completion) -> Rollout:
    return Rollout(
        prompt_ids=torch.tensor(request.prompt_ids),
        response_ids=completion.response_ids,
        sampler_logprobs=completion.sampler_logprobs,
        policy_version=0,
        finish_reason=completion.finish_reason,
        seed=request.seed,
        text="",
        images=request.images,
    )


def sampled(policy: Policy, prompts: list[Prompt], samples: int = 3, **engine: Any) -> list[Rollout]:
    requests = [Request(p.token_ids, seed, p.images) for p in prompts for seed in range(samples)]
    completions = engine_of(policy, **engine).generate(requests, Sampling(10))
    return [as_rollout(*pair) for pair in zip(requests, completions, strict=True)]


def scored(policy: Policy, rollouts: list[Rollout], budget: int = 10_000, **options: Any) -> list[Tensor]:
    return [score.logprobs for score in policy.score(rollouts, tokens_per_microbatch=budget, **options)]


def worst(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def of_family(family: str, pictures: list[str], folder: Path) -> tuple[Policy, list[Prompt]]:
    """A tiny model of the family, and prompts with pictures for it."""
    with torch.random.fork_rng():
        lm, processor = FAMILIES[family](folder)
    lm = lively(lm)
    lm.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    module = ActorCritic(lm, never=placeholder_ids(lm.config))
    policy = Policy(module, processor.tokenizer, device=CPU, temperature=1.0, vision=Vision(processor, lm))
    return policy, problems(pictures, processor, alike=family == "idefics3")


# --- every family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_sees_what_generation_sees(family: str, pictures: list[str], tmp_path: Path) -> None:
    """Pixels, grids, sizes and token types, padded on either side, alone and side by side."""
    policy, prompts = of_family(family, pictures, tmp_path)
    rollouts = sampled(policy, prompts)
    assert sum(len(r.response_ids) for r in rollouts) > 30
    own = [r.sampler_logprobs for r in rollouts]
    for budget in (1, 10_000):
        assert worst(scored(policy, rollouts, budget), own) < 2e-5
    for rollout, alone in zip(rollouts, sampled(policy, prompts, batch_size=1), strict=True):
        assert rollout.response_ids.tolist() == alone.response_ids.tolist()
    # Another picture of the same size is another prompt.
    swapped = [replace(r, images=(_swapped(r.images[0], tmp_path),)) for r in rollouts if len(r.images) == 1]
    assert worst(scored(policy, swapped), [r.sampler_logprobs for r in rollouts if len(r.images) == 1]) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_decode_as_text_models_do_have_the_draws_of_generate(
    family: str, pictures: list[str], tmp_path: Path
) -> None:
    """Qwen2-VL counts the places of its images by rows and columns, which is found by its log-probs; Gemma 3 has a
    window of fewer tokens. Those go by `generate`."""
    policy, prompts = of_family(family, pictures, tmp_path)
    requests = [Request(prompt.token_ids, seed, prompt.images) for prompt in prompts for seed in range(3)]
    engine, sampling = engine_of(policy), Sampling(6)
    longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_tokens
    assert engine._decodes(requests, longest) == (family not in ("qwen2_vl", "gemma3"))
    plain = zip(*engine._generated(requests, sampling), strict=True)
    for found, expected in zip(engine.generate(requests, sampling), plain, strict=True):
        completion = engine._completion(*expected)
        assert torch.equal(found.response_ids, completion.response_ids)
        torch.testing.assert_close(found.sampler_logprobs, completion.sampler_logprobs, atol=2e-5, rtol=0)


def _swapped(reference: str, folder: Path) -> str:
    with Image.open(reference) as picture:
        other = picture.rotate(180)
    other.paste("yellow", (0, 0, 5, 5))
    other.save(folder / "other.png" if picture.size == (16, 24) else folder / "another.png")
    return str(folder / "other.png" if picture.size == (16, 24) else folder / "another.png")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_log_probs_are_those_of_the_models_own_forward(family: str, pictures: list[str], tmp_path: Path) -> None:
    """On what the processor makes of prompt and response; PaliGemma reads the prompt in both directions."""
    lm, processor = FAMILIES[family](tmp_path)
    policy = policy_of(tmp_path)
    lm.eval()
    (prompt, *_) = problems(pictures, processor)
    with Image.open(prompt.images[0]) as picture:
        inputs = processor(text=["<image>3+4="], images=[[picture.convert("RGB")]], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == list(prompt.token_ids)
    response = torch.tensor([13, 22, 7, 1])
    ids = torch.cat([inputs["input_ids"], response[None]], 1)
    types = {}
    if "token_type_ids" in inputs:
        types = {"token_type_ids": torch.cat([inputs["token_type_ids"], torch.ones(1, 4, dtype=torch.long)], 1)}
    logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"], **types).logits
    logits[..., list(placeholder_ids(lm.config))] = -torch.inf
    expected = logits[0, -5:-1].log_softmax(-1).gather(-1, response[:, None])[:, 0]
    completion = Completion(response, torch.zeros(4), "stop")
    (found,) = scored(policy, [as_rollout(Request(prompt.token_ids, 0, prompt.images), completion)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if types:  # and it would not do to go on with the prompt's type
        assert policy.vision is not None
        policy.vision._of_responses["token_type_ids"] = 0
        (wrong,) = scored(policy, [as_rollout(Request(prompt.token_ids, 0, prompt.images), completion)])
        assert (wrong - expected).abs().max() > 1e-2


# --- the policy ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollouts(tiny_vision_model: Path, pictures: list[str]) -> list[Rollout]:
    policy = policy_of(tiny_vision_model)
    assert policy.vision is not None
    return sampled(policy, problems(pictures, policy.vision.processor))


def moved(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if parameter.requires_grad and name.startswith("lm."):
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("adapter", [{"type": "none"}, LORA], ids=["full", "lora"])
def test_an_anchor_sees_the_images_too(tiny_vision_model: Path, rollouts: list[Rollout], adapter: Any) -> None:
    policy = policy_of(tiny_vision_model, adapter=adapter)
    before = scored(policy, rollouts)
    anchor = policy.snapshot()
    assert any("vision_tower" in name for name in anchor)
    moved(policy)
    assert worst(scored(policy, rollouts), before) > 0.1
    assert worst(scored(policy, rollouts, anchor=anchor), before) == 0.0
    ids, mask = token_tensors(rollouts)
    zeros = torch.zeros(mask.shape)
    batch = Batch(ids, mask, zeros, zeros, zeros, zeros, torch.zeros(len(ids)), multimodal=policy.multimodal(rollouts))
    states = policy.anchor_states(batch, anchor)
    output = policy.module(ids, mask, 1.0, (states,), multimodal=batch.multimodal)
    assert output.divergences[0][mask].mean() > 1e-3
    torch.testing.assert_close(
        policy.module(ids, mask, 1.0, (policy.anchor_states(batch, policy.snapshot()),), multimodal=batch.multimodal)
        .divergences[0]
        .abs()
        .max(),
        torch.tensor(0.0),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("critic", [{"type": "shared"}, {"type": "separate"}], ids=["shared", "separate"])
def test_the_critic_sees_the_images(tiny_vision_model: Path, rollouts: list[Rollout], critic: Any) -> None:
    policy = policy_of(tiny_vision_model, advantage={"type": "gae", "critic": critic})
    torch.nn.init.ones_(policy.module.value_head.weight)
    first, second = rollouts[0], replace(rollouts[0], images=rollouts[3].images)
    assert first.images != second.images
    a, b = (s.values for s in policy.score([first, second], tokens_per_microbatch=1, with_values=True))
    assert (a - b).abs().max() > 1e-2


def test_gradients_reach_the_images_with_checkpointing_as_without(
    tiny_vision_model: Path, rollouts: list[Rollout]
) -> None:
    ids, mask = token_tensors(rollouts)
    for adapter in ({"type": "none"}, LORA):
        found = []
        for on in (False, True):
            torch.manual_seed(0)
            model = {"path": str(tiny_vision_model), "gradient_checkpointing": on}
            policy = policy_of(tiny_vision_model, model=model, adapter=adapter)
            moved(policy)
            policy.module.train()
            policy.module(ids, mask, 1.0, multimodal=policy.multimodal(rollouts)).logprobs[mask].sum().backward()
            found.append({n: p.grad for n, p in policy.module.named_parameters() if p.requires_grad})
        seen = [grad for name, grad in found[0].items() if "vision_tower" in name and "q_proj" in name]
        assert seen
        assert all(grad is not None and grad.any() for grad in seen)
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_no_policy_writes_the_place_of_an_image(tiny_vision_model: Path, rollouts: list[Rollout]) -> None:
    policy = policy_of(tiny_vision_model)
    (image,) = policy.module.never
    ids, mask = token_tensors(rollouts)
    output = policy.module(ids, mask, 1.0, multimodal=policy.multimodal(rollouts))
    assert output.entropy.isfinite().all()
    assert all(image not in r.response_ids for r in rollouts)
    # The other tokens share its probability: over each of them, the log-probs sum to one.
    first = replace(rollouts[0], response_ids=torch.tensor([2]))
    others = [
        replace(first, response_ids=torch.tensor([token])) for token in range(len(policy.tokenizer)) if token != image
    ]
    assert torch.cat(scored(policy, others)).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_pixels_are_computed_once_a_group_and_kept_for_a_while(
    tiny_vision_model: Path, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_vision_model)
    opened = []
    open_image = vision_module.open_image
    monkeypatch.setattr(
        vision_module, "open_image", lambda reference: opened.append(reference) or open_image(reference)
    )
    scored(policy, rollouts, budget=1)
    assert sorted(opened) == sorted({path for r in rollouts for path in r.images})
    monkeypatch.setattr(vision_module, "KEPT_BYTES", 1)
    scored(policy, rollouts)
    assert policy.vision is not None
    assert len(policy.vision._kept) == 1


# --- files --------------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("adapter", [{"type": "none"}, LORA], ids=["full", "lora"])
def test_weights_go_to_engines_and_files_under_the_checkpoints_names(
    tiny_vision_model: Path, rollouts: list[Rollout], tmp_path: Path, adapter: Any
) -> None:
    policy = policy_of(tiny_vision_model, adapter=adapter)
    moved(policy)
    own = names_in(tiny_vision_model)
    assert "vision_tower.vision_model.embeddings.position_embedding.weight" in own
    assert {name for name, _ in checkpoint_weights(policy.module.lm)} == own
    save_model(policy.module.lm, policy.reader, tmp_path, base_changed=True)
    assert names_in(tmp_path) == own
    _, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "LlavaProcessor"
    again = policy_of(tmp_path)
    assert worst(scored(again, rollouts), scored(policy, rollouts)) < 5e-5


def test_a_saved_adapter_of_the_vision_tower_is_one_that_peft_loads(
    tiny_vision_model: Path, rollouts: list[Rollout], tmp_path: Path
) -> None:
    policy = policy_of(tiny_vision_model, adapter=LORA)
    moved(policy)
    save_model(policy.module.lm, policy.reader, tmp_path, base_changed=False)
    assert "processor_config.json" in {path.name for path in tmp_path.iterdir()}
    base = AutoModelForImageTextToText.from_pretrained(tiny_vision_model)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    loaded.get_base_model().generation_config = policy.module.lm.generation_config
    module = ActorCritic(loaded, never=policy.module.never)
    other = Policy(module, policy.tokenizer, device=CPU, temperature=1.0, vision=policy.vision)
    assert worst(scored(other, rollouts), scored(policy, rollouts)) < 1e-5


def test_the_kind_of_a_model_is_read_off_its_config(tiny_model: Path, tiny_vision_model: Path) -> None:
    assert not sees_images(ModelConfig(path=str(tiny_model)))
    assert sees_images(ModelConfig(path=str(tiny_vision_model)))
    assert load_processor(ModelConfig(path=str(tiny_model)), needed=False) is None
    with pytest.raises(ValueError, match="a text model, and the task has images: choose a vision-language model"):
        load_processor(ModelConfig(path=str(tiny_model)), needed=True)


def test_a_processor_without_image_support_is_refused_where_it_is_needed(
    tiny_vision_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_vision_model, tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").unlink()
    config = ModelConfig(path=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"no processor that reads images \(.+\): save the model's own beside it"):
        load_processor(config, needed=True)
    assert load_processor(config, needed=False) is None  # text can still be trained on
    tokenizer = load_tokenizer(config)
    assert load_lm(config, tokenizer, torch.float32).config.model_type == "llava"
    with pytest.raises(ValueError, match="reads no images"):
        Vision(tokenizer, load_lm(config, tokenizer, torch.float32))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llava"
