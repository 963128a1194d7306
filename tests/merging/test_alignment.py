"""Alignment and merging while one task after the other is learnt, on hand-made tensors and in real runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remix.config import AlignmentConfig
from remix.merging.continual import (
    Alignment,
    average_into,
    masked_for_task,
    merge_adapters,
    sign_conflict,
)
from remix.types import Sampling
from tests.tiny import opened, tiny_recipe


class Adapter(nn.Module):
    """Two tensors of a LoRA and one of another kind."""

    def __init__(self, **values: list[float]) -> None:
        super().__init__()
        self.lm = nn.ModuleDict(
            {name: nn.ParameterDict({"w": nn.Parameter(torch.tensor(value))}) for name, value in values.items()}
        )


def aligned(
    config: AlignmentConfig, start: Any, now: Any, initial: Any = None
) -> tuple[Adapter, Any, dict[str, float]]:
    """What an alignment makes of `now` in a run that began with `start`; AdamW's moments are all 1 before."""
    module = Adapter(**start)
    snapshot = lambda: {n: p.detach().clone() for n, p in module.named_parameters()}  # noqa: E731
    policy = SimpleNamespace(module=module, snapshot=snapshot)
    optimizer = torch.optim.AdamW(module.parameters())
    first = None if initial is None else {f"lm.{name}.w": torch.tensor(value) for name, value in initial.items()}
    alignment = Alignment(config, policy, SimpleNamespace(optimizer=optimizer), updates=40, initial=first)  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        parameter.data = torch.tensor(now[name.split(".")[1]])
        ones = torch.ones_like(parameter)
        optimizer.state[parameter] = {"exp_avg": ones.clone(), "exp_avg_sq": ones.clone(), "step": torch.tensor(3.0)}
    return module, optimizer, alignment.align()


def moments(module: Adapter, optimizer: Any, name: str) -> list[list[float]]:
    state = optimizer.state[module.lm[name]["w"]]
    return [state["exp_avg"].tolist(), state["exp_avg_sq"].tolist()]


# Of |g| = 4, 3, 2, 1 the larger half is the first two. The second has turned, and so has the fourth, which counts not.
START = {"lora_A": [4.0, -3.0, 2.0, -1.0]}
TURNED = {"lora_A": [5.0, 0.5, 2.5, 0.5]}


def test_a_turned_important_entry_goes_back_and_its_moments_are_cleared() -> None:
    module, optimizer, metrics = aligned(AlignmentConfig(share=0.5), START, TURNED)
    assert module.lm["lora_A"]["w"].tolist() == [5.0, -3.0, 2.5, 0.5]
    assert moments(module, optimizer, "lora_A") == [[1, 0, 1, 1]] * 2
    assert metrics == {"misaligned_fraction": 0.5, "misaligned_fraction/lora_A.w": 0.5}


def test_reset_to_zero() -> None:
    module, *_ = aligned(AlignmentConfig(share=0.5, reset="zero"), START, TURNED)
    assert module.lm["lora_A"]["w"].tolist() == [5.0, 0.0, 2.5, 0.5]


def test_importance_by_change_leaves_out_what_is_still_its_random_start() -> None:
    # g - init = 0, 0, 2, -1: the larger half is the last two, of which the fourth has turned.
    config = AlignmentConfig(share=0.5, importance="change", initial="somewhere")
    module, *_ = aligned(config, START, TURNED, {"lora_A": [4.0, -3.0, 0.0, 0.0]})
    assert module.lm["lora_A"]["w"].tolist() == [5.0, 0.5, 2.5, -1.0]


def test_one_factor_alone() -> None:
    both = {"lora_A": START["lora_A"], "lora_B": START["lora_A"], "norm": START["lora_A"]}
    now = dict.fromkeys(both, TURNED["lora_A"])
    module, _, metrics = aligned(AlignmentConfig(share=0.5, factors=("B",)), both, now)
    assert module.lm["lora_A"]["w"].tolist() == TURNED["lora_A"]
    assert module.lm["lora_B"]["w"].tolist() == module.lm["norm"]["w"].tolist() == [5.0, -3.0, 2.5, 0.5]
    assert metrics.keys() == {"misaligned_fraction", "misaligned_fraction/lora_B.w", "misaligned_fraction/norm.w"}


def test_every_k_optimiser_steps_but_not_near_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    alignment = Alignment.__new__(Alignment)
    alignment.every = 5
    monkeypatch.setattr(alignment, "align", lambda: {"misaligned_fraction": 0.1}, raising=False)
    # 12 training steps of 2 optimiser steps: 5, 10, 15 are passed in the steps that end at 6, 10, 16. The one that ends
    # at 20 has 4 left, fewer than K.
    done = [2 * step for step in range(1, 13) if alignment.after(2 * step, 2, steps_left=12 - step)]
    assert done == [6, 10, 16]
    assert alignment.after(10, 0, steps_left=9) == {}  # all updates of the step were skipped


def test_a_twentieth_of_the_run_unless_told_otherwise() -> None:
    policy: Any = SimpleNamespace(module=Adapter(**START), snapshot=dict)
    for updates, every in ((400, 20), (7, 1)):
        assert Alignment(AlignmentConfig(), policy, None, updates=updates, initial=None).every == every  # type: ignore[arg-type]
    assert Alignment(AlignmentConfig(every=9), policy, None, updates=400, initial=None).every == 9  # type: ignore[arg-type]


def of(*values: float) -> dict[str, Tensor]:
    return {"x": torch.tensor(values)}


def test_averages_by_hand() -> None:
    assert average_into(of(1.0, 4.0), of(3.0, 0.0), 0.5)["x"].tolist() == [2.0, 2.0]
    third = average_into(average_into(of(3.0), of(6.0), 1 / 2), of(9.0), 1 / 3)
    assert third["x"].tolist() == pytest.approx([6.0])  # the mean of 3, 6, 9


def test_signs_by_hand() -> None:
    assert sign_conflict(of(*TURNED["lora_A"]), of(*START["lora_A"]), 0.5) == 0.5


def test_merging_is_of_changes_from_the_untrained_adapter() -> None:
    initial, tasks = of(1.0, 1.0), [of(3.0, 1.0), of(1.0, 0.0)]
    assert merge_adapters("task_arithmetic", initial, tasks, [0.5, 0.5])["x"].tolist() == [2.0, 0.5]
    # Trimmed to one entry each: +2 at the first, -1 at the second; nobody disagrees.
    assert merge_adapters("ties", initial, tasks, [1.0, 1.0], density=0.5)["x"].tolist() == [3.0, 0.0]
    assert merge_adapters("magmax", initial, tasks, [1.0, 1.0])["x"].tolist() == [3.0, 0.0]


def test_products_are_merged_as_products() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    initial = {"lora_A": draw(2, 5), "lora_B": torch.zeros(4, 2)}
    # Both tasks move along one direction, so that their mean product is of a rank that the adapter has.
    tasks = [{"lora_A": initial["lora_A"], "lora_B": draw(4, 2)} for _ in range(2)]
    merged = merge_adapters("task_arithmetic", initial, tasks, [0.5, 0.5], products=True)
    mean = sum(task["lora_B"] @ task["lora_A"] for task in tasks) / 2
    assert merged["lora_A"].shape == (2, 5)
    torch.testing.assert_close(merged["lora_B"] @ merged["lora_A"], mean)


def test_a_tasks_mask_keeps_what_is_its_own() -> None:
    # g - init = 2, 2, 2; the task's change is 2, 1, -1. |task| ≥ .4·|g - task|: 2 ≥ 0, 1 ≥ .4, 1 < 1.2.
    masked = masked_for_task(of(3.0, 3.0, 3.0), of(1.0, 1.0, 1.0), of(3.0, 2.0, 0.0), 0.4)
    assert masked["x"].tolist() == [3.0, 3.0, 1.0]


def test_the_sampler_sees_what_an_alignment_has_changed(tiny_model: Path, tmp_path: Path) -> None:
    """A run of its own with `alignment:`, from a saved adapter: entries go back amid training, and the engine answers
    with the aligned weights."""
    adapter = {"type": "lora", "rank": 4, "alpha": 8}
    first = tiny_recipe(tiny_model, tmp_path / "first", {"adapter": adapter})
    from remix.train import run

    run(first)
    changes = {
        "adapter": adapter | {"path": str(tmp_path / "first" / "final")},
        "alignment": {"every": 2, "share": 1.0},
        "steps": 4,
        "optimizer": {"lr": 0.05},
    }
    with opened(tiny_recipe(tiny_model, tmp_path / "second", changes)) as trainer:
        began = trainer.policy.snapshot()
        trainer.fit()
        metrics = [line for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines() if "misal" in line]
        assert len(metrics) == 3  # after steps of 2 updates each, but not after the last
        groups = trainer.sampler.sample(trainer.stream.take(0, 2), Sampling(8), 2, version=9)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = trainer.policy.score(rollouts, tokens_per_microbatch=512)
        for rollout, score in zip(rollouts, scores, strict=True):
            torch.testing.assert_close(rollout.sampler_logprobs, score.logprobs, atol=1e-4, rtol=1e-4)
        trainer.alignment.align()
        now = trainer.policy.snapshot()
    assert all(((now[name].sign() == g.sign()) | (g == 0)).all() for name, g in began.items())
