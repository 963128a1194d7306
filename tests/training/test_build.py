"""What a recipe's numbers become in the trainer that is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import opened, tiny_recipe, weights_of

LORA = {"type": "lora", "rank": 4, "alpha": 8}


@pytest.mark.parametrize(
    ("prompts", "fraction", "fresh", "replayed"),
    # round(p * prompts) prompts are replayed: 1.6 -> 2, 3.6 -> 4, 2.5 -> 2 and 1.5 -> 2 (halves go to even).
    [(4, 0.4, 2, 2), (9, 0.4, 5, 4), (5, 0.5, 3, 2), (3, 0.5, 1, 2), (6, 0.5, 3, 3)],
)
def test_a_step_with_replay_has_a_whole_batch(
    tiny_model: Path, tmp_path: Path, prompts: int, fraction: float, fresh: int, replayed: int
) -> None:
    changes = {
        "phases": [{"type": "mix_policy", "off_policy_fraction": fraction, "window": 1, "utd_ratio": 1}],
        "batch": {"prompts": prompts, "minibatches": 1},
        "rollout": {"drop_uniform_groups": False},
        "kl": {"weight": 0},
        "eval": {"every": 0, "prompts": 1},
    }
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as trainer:
        seen = [trainer._step(step) for step in range(2)]
    group = trainer.recipe.rollout.group_size
    # Replay is empty at first, so the first step is fresh throughout.
    assert [(m["rollouts/fresh"], m["batch/replayed"]) for m in seen] == [
        (prompts * group, 0),
        (fresh * group, replayed * group),
    ]
    assert {m["batch/rollouts"] for m in seen} == {prompts * group}


def test_the_seed_decides_the_fresh_adapter(tiny_model: Path, tmp_path: Path) -> None:
    def built(seed: int) -> dict[str, torch.Tensor]:
        with opened(tiny_recipe(tiny_model, tmp_path / str(seed), {"seed": seed, "adapter": LORA})) as trainer:
            return {name: tensor for name, tensor in weights_of(trainer).items() if ".lora_A." in name}

    a, other, again = built(1), built(2), built(1)
    assert len(a) == 14  # seven matrices in each of two layers
    assert all(torch.equal(a[name], again[name]) for name in a)
    assert all(not torch.equal(a[name], other[name]) for name in a)


def test_a_reference_that_was_never_kept_is_missed(tiny_model: Path, tmp_path: Path) -> None:
    """Taken from the resumed policy it would read a KL of 0 for ever."""
    changes: dict[str, Any] = {"kl": {"weight": 0}, "max_steps": 1, "eval": {"every": 0, "prompts": 1}}
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as trainer:
        trainer.fit()
    with (
        pytest.raises(ValueError, match=r"kl.weight was 0.0, is 0.1"),
        opened(tiny_recipe(tiny_model, tmp_path, {**changes, "kl": {"weight": 0.1}}), resume=True),
    ):
        pass
    with opened(tiny_recipe(tiny_model, tmp_path, changes), resume=True) as trainer:
        assert trainer.state.step == 1
