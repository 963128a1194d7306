"""vLLM on images, where torchvision is installed; elsewhere what is said instead."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from remix.rollout import frames
from remix.types import Request, Sampling
from tests.tiny import MIX, make_picture_task, opened, tiny_recipe
from tests.training.test_degenerate import metrics_of


def test_references_travel_to_the_engines_process_and_no_pixels() -> None:
    requests = [Request((3, 4), 7, ("a.png", "shapes:count/train/0/1")), Request((5,), 8)]
    frame = frames.pack_requests(requests, Sampling(4))
    assert len(frame) < 1000
    assert frames.unpack_requests(frames.unpack(frame)) == (requests, Sampling(4))


KL = {"weight": 0.1}


def recipe_of(model: Path, folder: Path, **engine: Any) -> Any:
    changes = {
        "steps": 3, "phases": MIX, "kl": KL, "prompt": {"max_tokens": 24}, "optimizer": {"lr": 0.003},
        "tasks": [make_picture_task(folder / "task")], "rollout": {"engine": {"type": "vllm", **engine}},
    }  # fmt: skip
    return tiny_recipe(model, folder / "run", changes)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's vision-language models import torchvision")
@pytest.mark.parametrize("own_process", [False, True])
def test_vllm_samples_from_the_trained_policy_on_images(
    tiny_vision_model: Path, tmp_path: Path, own_process: bool
) -> None:
    """After every sync its log-probs are the trainer's, vision tower included."""
    recipe = recipe_of(tiny_vision_model, tmp_path, own_process=own_process)
    with opened(recipe) as t:
        before = {name: p.clone() for name, p in t.policy.module.named_parameters() if "vision_tower" in name}
        t.fit()
        after = dict(t.policy.module.named_parameters())
        assert any((after[name] - tensor).abs().max() > 1e-3 for name, tensor in before.items())
    for line in metrics_of(tmp_path / "run"):
        assert line["sampler/probe"] < 1e-4
        assert line["sampler/mismatch_max"] < 1e-3


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_without_torchvision_the_other_engine_is_named(tiny_vision_model: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"need torchvision, which is not installed .*rollout\.engine\.type: hf"),
        opened(recipe_of(tiny_vision_model, tmp_path)),
    ):
        pass
    assert not (tmp_path / "run").exists()
