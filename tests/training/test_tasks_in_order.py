"""Tasks one after the other, end to end on the tiny text model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from remix.config import Recipe, RecipeError
from remix.evaluation.continual import read_record
from remix.evaluation.continual_report import markdown
from remix.train import run
from remix.training.loop import Trainer
from remix.training.stages import make_plans
from tests.tiny import MIX, tiny_recipe
from tests.training.test_processes import launch

SHORT: dict[str, Any] = {"type": "arithmetic", "max_terms": 3, "size": 64}
TASKS = [SHORT | {"kinds": ["sum"], "label": "sums"}, SHORT | {"kinds": ["product_sum"], "label": "products"}]
IMITATION: dict[str, Any] = {
    "objective": {"type": "sft", "entropy_weight": 0.0},
    "rollout": {"group_size": 1},
    "kl": {"weight": 0.0},
}
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "independent": {},
    "replay": {"stored": 8},
    "average": {},
    "ties": {"form": "delta"},
    "magmax": {},
    "pam": {"alignment": {"every": 1}},
    "pam+tall": {},
}


def recipe_of(model: Path, run_dir: Path, method: str = "pam", **changes: Any) -> Recipe:
    plain: dict[str, Any] = {
        "adapter": {"type": "lora", "rank": 4, "alpha": 8},
        "steps": 3,
        "tasks": TASKS,
        "prompt": {"max_tokens": 24},
        "checkpoint": {"every": 1},
        "optimizer": {"lr": 0.01},
        "continual": {"method": {"type": method} | METHODS[method]},
    }
    return tiny_recipe(model, run_dir, plain | changes)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_in_order_and_evaluates_on_all(tiny_model: Path, tmp_path: Path, method: str) -> None:
    result = run(recipe_of(tiny_model, tmp_path / "run", method))
    record = read_record(tmp_path / "run")
    assert [row.task for row in record.learnt] == record.order == ["sums", "products"]
    assert all(row.merged.keys() == row.own.keys() == {"sums", "products"} for row in record.learnt)
    assert result.keys() >= {"ACC", "BWT", "forgetting", "zero_shot"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists() == (method != "independent")
    first, second = (tmp_path / "run" / "stages" / f"task={index:02d}" for index in range(2))
    # Each later task begins from what its method says, which is the policy that its first step has.
    start = {"sequential": first / "final", "replay": first / "final", "magmax": first / "final"}
    start |= {"pam": first / "merged", "pam+tall": first / "merged"}
    own = json.loads((second / "final" / "adapter_config.json").read_text())
    assert own["r"] == 4
    assert f"path: {start.get(method, tmp_path / 'run' / 'initial')}" in (second / "recipe.yaml").read_text()


def test_pam_is_the_mean_of_what_was_and_what_was_trained(tiny_model: Path, tmp_path: Path) -> None:
    run(recipe_of(tiny_model, tmp_path, "pam"))
    first, second = (tmp_path / "stages" / f"task={index:02d}" for index in range(2))
    g, w, kept = adapter(first / "merged"), adapter(second / "final"), adapter(second / "merged")
    assert all(torch.equal(g[name], tensor) for name, tensor in adapter(first / "final").items())
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, (g[name] + w[name]) / 2)
    assert all(torch.equal(kept[name], tensor) for name, tensor in adapter(tmp_path / "final").items())
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [("misaligned_fraction" in row) for row in rows] == [True, True, False]  # not within K of the end
    assert not any("misaligned_fraction" in line for line in (first / "metrics.jsonl").read_text().splitlines())
    record = read_record(tmp_path)
    assert record.learnt[1].sign_conflict is not None
    for number, folder in enumerate((first / "merged", second / "merged"), 1):
        _, head, text = (folder / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(head)["base_model"] == str(tiny_model)
        assert text.strip() == markdown(replace(record, learnt=record.learnt[:number])).strip()
        assert f"{number} of 2 tasks learnt" in text
    assert (tmp_path / "final" / "README.md").read_text() == (second / "merged" / "README.md").read_text()


@pytest.mark.parametrize("place", ["inside the second task", "before it is merged"])
def test_interrupted_it_goes_on_as_if_it_had_not_been(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run(recipe_of(tiny_model, tmp_path / "whole"))
    broken = recipe_of(tiny_model, tmp_path / "broken")

    class Killed(BaseException):
        pass

    step, calls = Trainer._step, list[int]()

    def dying(self: Trainer, number: int) -> dict[str, float]:
        calls.append(number)
        if len(calls) == 5:  # the second step of the second task
            raise Killed
        return step(self, number)

    def died(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if place == "before it is merged":
            patch.setattr("remix.training.continual.sign_conflict", died)
        else:
            patch.setattr(Trainer, "_step", dying)
        with pytest.raises(Killed):
            run(broken)
    assert len(read_record(tmp_path / "broken").learnt) == 1
    run(broken, resume=True)
    for name in ("stages/task=00/final", "stages/task=01/final", "final"):
        whole, resumed = adapter(tmp_path / "whole" / name), adapter(tmp_path / "broken" / name)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    whole, resumed = (read_record(tmp_path / name).learnt for name in ("whole", "broken"))
    assert [(row.own, row.merged, row.sign_conflict) for row in whole] == [
        (row.own, row.merged, row.sign_conflict) for row in resumed
    ]


def test_an_order_of_ones_own_and_a_plan_for_every_task(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model, tmp_path, continual={"order": ["products", "sums"], "method": {"type": "replay"}})
    plans = make_plans(recipe)
    assert list(plans) == ["products", "sums"]
    assert plans["sums"].rollouts == plans["products"].rollouts
    with pytest.raises(ValueError, match="did you mean 'sums'"):
        make_plans(recipe_of(tiny_model, tmp_path, continual={"order": ["sumss", "products"]}))
    with pytest.raises(ValueError, match="there twice"):
        make_plans(recipe_of(tiny_model, tmp_path, continual={"order": ["sums", "sums"]}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"type": "none"}}, "set adapter.type"),
        ({"adapter": {"type": "lora", "path": "somewhere"}}, "remove adapter.path"),
        ({"reincarnation": {"lora": "merge"}}, "lora to snapshot"),
        ({"eval": {"benchmarks": ["math"]}}, "remove eval.benchmarks"),
        ({"eval": {"tasks": TASKS}}, "remove eval.benchmarks and eval.tasks"),
        ({"max_steps": 2}, "in place of max_steps"),
        (
            {
                "adapter": {"type": "lora", "dora": True},
                "continual": {"method": {"type": "average", "form": "delta"}},
            },
            "form delta",
        ),
        ({"continual": None, "alignment": {}}, "set adapter.path"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(tiny_model, tmp_path, **changes)


def test_another_recipe_does_not_go_on_with_it(tiny_model: Path, tmp_path: Path) -> None:
    run(recipe_of(tiny_model, tmp_path))
    with pytest.raises(ValueError, match="already holds a run"):
        run(recipe_of(tiny_model, tmp_path))
    with pytest.raises(ValueError, match="seed was 0, is 3"):
        run(recipe_of(tiny_model, tmp_path, seed=3), resume=True)
    with pytest.raises(ValueError, match="begin a new run"):  # what is recorded would be of another method
        run(recipe_of(tiny_model, tmp_path, method="average"), resume=True, allow_changed=True)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"type": "jsonl", "path": "nowhere.jsonl"}, "no such file"),
        (SHORT | {"kinds": ["sum_subtract"], "max_terms": 5, "label": "long"}, "prompt.max_tokens"),
    ],
)
def test_what_a_later_task_lacks_is_found_before_the_first_begins(
    tiny_model: Path, tmp_path: Path, second: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        run(recipe_of(tiny_model, tmp_path / "run", tasks=[TASKS[0], second], prompt={"max_tokens": 8}))
    assert not list((tmp_path / "run").glob("*.json"))


def test_a_task_without_held_out_problems_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"id": str(n), "problem": f"{n}+1=", "answer": str(n + 1)}) for n in range(1, 9)]
    (tmp_path / "all.jsonl").write_text("\n".join(rows))
    second = {"type": "jsonl", "path": str(tmp_path / "all.jsonl"), "holdout": 0.0}
    with pytest.raises(ValueError, match="'all' has no held-out problems"):
        run(recipe_of(tiny_model, tmp_path / "run", tasks=[TASKS[0], second]))


def test_two_processes_learn_as_one_does(tiny_model: Path, tmp_path: Path) -> None:
    recipes = [
        recipe_of(tiny_model, tmp_path / f"run{number}", optimizer={"lr": 0.01, "eps": 1e-3}) for number in (1, 2)
    ]
    run(recipes[0])
    launch(recipes[1], tmp_path / "launch")
    one, two = (adapter(tmp_path / f"run{processes}" / "final") for processes in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "objective",
    [
        {"advantage": {"type": "gae"}},
        {
            "phases": [MIX[0] | {"until": [{"type": "steps", "after": 1}]}, {"type": "on_policy"}],
            "kl": {"lambda_schedule": {"hold": 0}},
        },
        IMITATION,
        {"rollout": {"engine": {"type": "vllm"}}},
    ],
    ids=["ppo", "remix", "sft", "vllm"],
)
def test_any_objective_and_engine(tiny_model: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    result = run(recipe_of(tiny_model, tmp_path, **{"steps": 2} | objective))
    assert result["tasks"] == 2
    first, second = (tmp_path / "stages" / f"task={index:02d}" / "merged" for index in range(2))
    assert all(not torch.equal(adapter(second)[name], tensor) for name, tensor in adapter(first).items())
