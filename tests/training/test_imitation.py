"""Supervised fine-tuning by the one loop: demonstrations in place of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from remix.config import Recipe, RecipeError
from remix.tasks import load_tasks
from remix.tasks.arithmetic import careful_chain
from remix.train import run
from remix.types import Sampling
from tests.tiny import opened, tiny_recipe, weights_of
from tests.training.test_degenerate import metrics_of

SFT: dict[str, Any] = {
    "objective": {"type": "sft", "entropy_weight": 0.0},
    "rollout": {"group_size": 1},
    "kl": {"weight": 0.0},
    "batch": {"minibatches": 1},
    "optimizer": {"lr": 3e-3},
}


def test_the_loss_is_the_cross_entropy_of_the_solutions(tiny_model: Path, tmp_path: Path) -> None:
    with opened(tiny_recipe(tiny_model, tmp_path, SFT)) as trainer:
        fresh = trainer.sampler.sample(trainer.stream.take(0, 6), Sampling(24), 1, version=0)
        assert [group.rollouts[0].text for group in fresh] == [careful_chain(group.prompt.content) for group in fresh]
        _, samples = trainer.experience.prepare(fresh, [], step=0, kl_lambda=1.0, reference_since=0)
        total, tokens = 0.0, 0
        for sample in samples:
            prompt, response = sample.rollout.prompt_ids, sample.rollout.response_ids
            assert response[-1].item() in trainer.policy.module.eos_token_ids
            logits = trainer.policy.module.lm(input_ids=torch.cat([prompt, response])[None]).logits[0]
            total += cross_entropy(logits[len(prompt) - 1 : -1], response, reduction="sum").item()
            tokens += len(response)
        metrics, _ = trainer.updater.run(samples, step=0, passes=1, kl_lambda=1.0)
    assert metrics["loss/policy"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_solution_beyond_the_limit_is_cut(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And said so once; a token of this model is a character, and one more ends the solution."""

    def limited(name: str, most: int) -> Recipe:
        rollout, rewards = {"group_size": 1, "max_tokens": most}, [{"type": "exact_match"}]
        changes = SFT | {"rollout": rollout, "rewards": rewards, "steps": 1}
        return tiny_recipe(tiny_model, tmp_path / name, changes)

    with opened(limited("cut", 9)) as trainer:
        (group,) = trainer.sampler.sample(trainer.stream.take(0, 1), Sampling(2), 1, version=0)
    assert group.rollouts[0].truncated
    assert trainer.sampler.decode(group.rollouts[0].response_ids.tolist()) == group.prompt.solution[:2]
    run(limited("run", 9))
    (task,) = load_tasks(limited("cut", 9).tasks, "train")
    lengths = [len(prompt.solution) + 1 for prompt in task.prompts]
    long, longest = sum(length > 9 for length in lengths), max(lengths)
    assert 0 < long < len(lengths)
    said = f"{long} of {len(lengths)} demonstrations are cut at rollout.max_tokens 9, "
    shown = capsys.readouterr().out
    assert shown.count(said) == 1
    assert f"the longest has {longest} tokens: set rollout.max_tokens to {longest} to" in shown
    with opened(limited("whole", longest)) as trainer:
        assert trainer.sampler.cut(task.prompts, longest) is None


def test_it_learns_the_demonstrations_and_resumes_exactly(tiny_model: Path, tmp_path: Path) -> None:
    changes = SFT | {"steps": 6, "checkpoint": {"every": 3}}
    with opened(tiny_recipe(tiny_model, tmp_path / "whole", changes)) as trainer:
        trainer.fit()
        weights = weights_of(trainer)
    rows = metrics_of(tmp_path / "whole")
    assert rows[-1]["loss/policy"] < 0.8 * rows[0]["loss/policy"]
    assert "sampler/mismatch_mean" not in rows[0]
    part = tiny_recipe(tiny_model, tmp_path / "part", changes | {"max_steps": 3})
    with opened(part) as trainer:
        trainer.fit()
    with opened(part.model_copy(update={"max_steps": None}), resume=True) as trainer:
        trainer.fit()
        resumed = weights_of(trainer)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_the_tasks_of_evaluation_are_exams_by_name(tiny_model: Path, tmp_path: Path) -> None:
    short = {"type": "arithmetic", "max_terms": 3}
    tasks = [short | {"kinds": ["sum"], "label": "sum"}, short | {"kinds": ["product_sum"], "label": "products"}]
    with opened(tiny_recipe(tiny_model, tmp_path, SFT | {"steps": 1, "eval": {"tasks": tasks}})) as trainer:
        trainer.fit()
    (row,) = metrics_of(tmp_path)
    both = (row["eval/sum/pass@1"] + row["eval/products/pass@1"]) / 2
    assert row["eval/pass@1"] == pytest.approx(both)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"group_size": 4}}, "group_size to 1"),
        ({"advantage": {"type": "gae"}}, "leave out advantage"),
        ({"kl": {"weight": 1e-3}}, "kl.estimator to full"),
        ({"phases": [{"type": "mix_policy"}]}, "nothing to replay"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        tiny_recipe(tiny_model, tmp_path, SFT | changes)
