"""Whole runs on images: a tiny LLaVA by every objective, replayed, resumed, exported; what is refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from remix.models.loading import load_lm, load_processor, load_tokenizer
from remix.models.vision import Vision
from remix.replay import read_shard, shard_path
from remix.rollout.hf import HFEngine
from remix.training.finish import finish
from remix.training.plan import make_plan
from remix.types import Request, Sampling
from tests.tiny import MIX, make_picture_task, make_tiny_vision_model, opened, tiny_recipe, weights_of
from tests.training.test_degenerate import metrics_of

LORA = {"type": "lora", "rank": 4}
PHASES = [{**MIX[0], "until": [{"type": "steps", "after": 2}]}, {"type": "on_policy"}]
KL = {"weight": 0.1, "lambda_schedule": {"start": 0.9, "hold": 1, "every": 1, "drop": 0.2}}
PPO = {"type": "gae", "critic": {"type": "separate"}}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_picture_task(tmp_path_factory.mktemp("task"))


def recipe_of(model: Path, run_dir: Path, task: dict[str, Any], **changes: Any) -> Any:
    return tiny_recipe(model, run_dir, {"tasks": [task], "prompt": {"max_tokens": 24}, **changes})


def run(recipe: Any, *, resume: bool = False) -> dict[str, torch.Tensor]:
    with opened(recipe, resume=resume) as trainer:
        trainer.fit()
        finish(trainer, "test.yaml")
        return weights_of(trainer)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"advantage": PPO},
        {"phases": PHASES, "kl": KL, "steps": 3},
        {"phases": PHASES, "kl": {**KL, "estimator": "full"}, "steps": 3, "advantage": {"type": "gae"}},
        {"phases": PHASES, "kl": KL, "steps": 3, "adapter": LORA, "reincarnation": {"lora": "merge"}},
    ],
    ids=["grpo", "ppo", "remix", "remix-ppo-full-kl", "remix-lora-merge"],
)
def test_every_objective_trains_on_images(
    tiny_vision_model: Path, tmp_path: Path, task: dict[str, Any], changes: dict[str, Any]
) -> None:
    recipe = recipe_of(tiny_vision_model, tmp_path, task, **changes)
    with opened(recipe) as t:
        before = weights_of(t)
        t.fit()
        finish(t, "test.yaml")
        after = weights_of(t)
        rollouts = [r for group in read_shard(shard_path(tmp_path, 0)) for r in group.rollouts]
        now = [s.logprobs for s in t.policy.score(rollouts, tokens_per_microbatch=4096)]
    seen = [name for name in before if "vision_tower" in name and "encoder.layers.0" in name]
    assert seen
    if changes.get("reincarnation") is None:  # a merged adapter starts anew
        assert any(not torch.equal(before[name], after[name]) for name in seen)
    lines = metrics_of(tmp_path)
    assert all(line["sampler/mismatch_max"] < 1e-4 for line in lines)
    tables = [pq.read_table(path) for path in (tmp_path / "rollouts").glob("*.parquet")]
    assert {len(images) for table in tables for images in table["images"].to_pylist()} == {0, 1, 2}
    if "phases" in changes:
        assert lines[1]["policy_lag/mean"] > 0
    # What is left behind is a standard model with its processor, which samples as the trainer did.
    final = tmp_path / "final"
    processor = AutoProcessor.from_pretrained(final)
    if "adapter_config.json" in {path.name for path in final.iterdir()}:
        lm = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_vision_model), final)
    else:
        lm, loading = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
        assert not loading["missing_keys"]
        assert not loading["unexpected_keys"]
    vision = Vision(processor, lm)
    for rollout, logprobs in list(zip(rollouts, now, strict=True))[:6]:
        inputs = vision.inputs([(rollout.prompt_ids.tolist(), rollout.images)], len(rollout.prompt_ids))
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
        logits = lm.eval()(input_ids=ids, **inputs).logits[0, len(rollout.prompt_ids) - 1 : -1].detach()
        logits[:, processor.image_token_id] = -torch.inf
        own = logits.log_softmax(-1).gather(-1, rollout.response_ids[:, None])[:, 0]
        torch.testing.assert_close(own, logprobs, atol=1e-4, rtol=1e-4)


def test_a_stored_rollout_can_be_replayed_from_its_shard(
    tiny_vision_model: Path, tmp_path: Path, task: dict[str, Any]
) -> None:
    recipe = recipe_of(tiny_vision_model, tmp_path, task, steps=1)
    with opened(recipe) as t:
        t.fit()
    columns = pq.read_table(tmp_path / "rollouts" / "step=000000.parquet").to_pylist()
    assert any(row["images"] and row["images"][0].endswith(".png") for row in columns)
    groups = read_shard(shard_path(tmp_path, 0))
    assert all(rollout.images == group.prompt.images for group in groups for rollout in group.rollouts)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    with opened(recipe_of(tiny_vision_model, tmp_path / "other", task)) as fresh:
        scores = fresh.policy.score(rollouts, tokens_per_microbatch=4096)
    for rollout, score in zip(rollouts, scores, strict=True):
        torch.testing.assert_close(score.logprobs, rollout.behaviour_logprobs, atol=1e-5, rtol=0)


def test_a_resumed_run_on_images_is_the_run_it_would_have_been(
    tiny_vision_model: Path, tmp_path: Path, task: dict[str, Any]
) -> None:
    changes = {"phases": PHASES, "kl": KL, "steps": 4, "advantage": PPO}
    whole = run(recipe_of(tiny_vision_model, tmp_path / "whole", task, **changes))
    run(recipe_of(tiny_vision_model, tmp_path / "parts", task, **changes, max_steps=2))
    parts = run(recipe_of(tiny_vision_model, tmp_path / "parts", task, **changes), resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for step in range(4):
        shards = [pq.read_table(shard_path(tmp_path / name, step)) for name in ("whole", "parts")]
        assert shards[0].equals(shards[1])


def test_a_run_does_not_go_on_with_other_pictures(tiny_vision_model: Path, tmp_path: Path) -> None:
    task = make_picture_task(tmp_path)
    run(recipe_of(tiny_vision_model, tmp_path / "run", task, max_steps=1))
    rows = [json.loads(line) for line in Path(task["path"]).read_text().splitlines()]
    for row in rows:
        row["shown"] = row["shown"][::-1] if isinstance(row["shown"], list) else row["shown"]
    Path(task["path"]).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with (
        pytest.raises(ValueError, match="the training prompts are not those that the run was begun with"),
        opened(recipe_of(tiny_vision_model, tmp_path / "run", task), resume=True),
    ):
        pass


def test_held_out_pictures_are_evaluated(tiny_vision_model: Path, tmp_path: Path, task: dict[str, Any]) -> None:
    with opened(recipe_of(tiny_vision_model, tmp_path, task, steps=1)) as t:
        (exam,) = t.exams
        assert any(prompt.images for prompt in exam.prompts)
        asked = []
        generate = t.sampler.engine.generate
        t.sampler.engine.generate = lambda requests, sampling: asked.extend(requests) or generate(requests, sampling)
        t.fit()
    held_out = {prompt.images for prompt in exam.prompts if prompt.images}
    assert held_out <= {request.images for request in asked}


def test_generated_pictures_train_too(tmp_path: Path) -> None:
    """The shapes task, whose pictures have names and no files."""
    model = make_tiny_vision_model(tmp_path / "model")
    task = {"type": "shapes", "kind": "count", "size": 16}
    changes = {"phases": MIX, "prompt": {"max_tokens": 64}}
    run(tiny_recipe(model, tmp_path / "run", {"tasks": [task], **changes}))
    rollouts = [r for group in read_shard(shard_path(tmp_path / "run", 1)) for r in group.rollouts]
    assert all(r.images[0].startswith("shapes:") for r in rollouts)
    config = recipe_of(model, tmp_path / "run", task).model
    processor = load_processor(config, needed=True)
    lm = load_lm(config, load_tokenizer(config, processor), torch.float32)
    engine = HFEngine(
        lm, eos_token_ids=[1], batch_size=8, device=torch.device("cpu"),
        autocast=torch.inference_mode, never=[processor.image_token_id], vision=Vision(processor, lm),
    )  # fmt: skip
    same, other = (Request(tuple(r.prompt_ids.tolist()), 0, r.images) for r in (rollouts[0], rollouts[-1]))
    other = Request(same.prompt_ids, 0, other.images)
    first, second = engine.generate([same, other], Sampling(8))
    assert not torch.equal(first.sampler_logprobs, second.sampler_logprobs)


# --- refused before anything is written ---------------------------------------------------------------------------


def refusal(recipe: Any) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refused, opened(recipe):
        pass
    assert not Path(recipe.run_dir).exists()
    return str(refused.value)


def test_a_text_model_is_given_no_images(tiny_model: Path, tmp_path: Path, task: dict[str, Any]) -> None:
    said = refusal(recipe_of(tiny_model, tmp_path / "run", task))
    assert "a text model, and the task has images: choose a vision-language model" in said


def test_an_image_that_does_not_open(tiny_vision_model: Path, tmp_path: Path) -> None:
    broken = make_picture_task(tmp_path / "task")
    whole = (tmp_path / "task" / "pictures" / "3.png").read_bytes()
    for content in (b"no picture", whole[: len(whole) // 2], None):
        target = tmp_path / "task" / "pictures" / "3.png"
        target.unlink(missing_ok=True)
        if content is not None:
            target.write_bytes(content)
        assert "3.png" in refusal(recipe_of(tiny_vision_model, tmp_path / "run", broken))


def test_a_processor_that_reads_no_images(tmp_path: Path, task: dict[str, Any]) -> None:
    model = make_tiny_vision_model(tmp_path / "model")
    (model / "processor_config.json").unlink()
    assert "no processor that reads images" in refusal(recipe_of(model, tmp_path / "run", task))
    text = {"type": "arithmetic", "kinds": ["sum"], "size": 32}
    run(recipe_of(model, tmp_path / "text", text, steps=1))  # text can still be trained on


def test_a_model_that_reads_images_in_its_own_way(
    tiny_vision_model: Path, tmp_path: Path, task: dict[str, Any]
) -> None:
    """A processor that leaves room for another number of features than the model has of an image."""
    model = make_tiny_vision_model(tmp_path / "model")
    config = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps(config | {"num_additional_image_tokens": 2}))
    said = refusal(recipe_of(model, tmp_path / "run", task))
    assert "a model of type llava reads images in a way that is not supported (" in said


def test_the_plan_refuses_images_for_a_text_model(tiny_model: Path, tmp_path: Path, task: dict[str, Any]) -> None:
    said = r"\Atasks\.1 has images, and .* is a text model: set model\.path to a vision-language model"
    text = {"type": "arithmetic", "kinds": ["sum"], "size": 32}
    for images in (task, {"type": "shapes", "kind": "count"}):
        recipe = tiny_recipe(tiny_model, tmp_path / "run", {"tasks": [text, images]})
        with pytest.raises(ValueError, match=said):
            make_plan(recipe)
