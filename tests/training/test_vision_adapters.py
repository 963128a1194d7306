"""Each kind of adapter on a vision-language model, or why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from remix.training.finish import finish
from tests.tiny import MIX, make_picture_task, make_tiny_vision_model, opened, tiny_recipe, weights_of
from tests.training.test_degenerate import metrics_of

KINDS: list[dict[str, Any]] = [
    {"type": "lora", "rank": 4},
    {"type": "ia3"},
    {"type": "prefix", "tokens": 3},
    {"type": "prompt", "tokens": 3},
    {"type": "layers", "last_blocks": 1, "norms": True},
]


def recipe_of(model: Path, folder: Path, adapter: dict[str, Any]) -> Any:
    task = make_picture_task(folder / "task")
    changes = {"tasks": [task], "prompt": {"max_tokens": 24}, "adapter": adapter, "phases": MIX, "kl": {"weight": 0.1}}
    return tiny_recipe(model, folder / "run", changes)


@pytest.mark.parametrize("adapter", KINDS, ids=lambda kind: str(kind["type"]))
def test_each_kind_trains_on_images(tiny_vision_model: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    with opened(recipe_of(tiny_vision_model, tmp_path, adapter)) as t:
        before = weights_of(t)
        t.fit()
        finish(t, "test.yaml")
        after = weights_of(t)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(line["sampler/mismatch_max"] < 1e-4 for line in metrics_of(tmp_path / "run"))
    assert {"adapter_model.safetensors", "processor_config.json"} <= {
        p.name for p in (tmp_path / "run/final").iterdir()
    }


@pytest.mark.parametrize("adapter", KINDS[2:4], ids=lambda kind: str(kind["type"]))
def test_virtual_tokens_before_a_prompt_that_is_read_in_both_directions(
    tmp_path: Path, adapter: dict[str, Any]
) -> None:
    """PaliGemma's generation does not place them as its training forward does, so the run is refused."""
    model = make_tiny_vision_model(tmp_path / "model", family="paligemma")
    with (
        pytest.raises(ValueError, match=r"type paligemma reads images in a way .* another adapter\.type"),
        opened(recipe_of(model, tmp_path, adapter)),
    ):
        pass
    assert not (tmp_path / "run").exists()
