"""Every backend trains the model that one process trains; `scripts/prove_backends.py` has the whole matrix.

In each run the loss of the second update is NaN, so that what a backend does of an update which is skipped shows too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from remix import train
from remix.config import Recipe, dump_recipe
from remix.replay import logged_steps, read_shards, write_shard
from remix.training.backends import Backend, asked_for, check_launch, check_recipe
from scripts.prove_backends import BACKENDS, HALF, STEPS, all_cases, cut, differences, launch
from tests.faults import plant
from tests.tiny import MIX, ROOT, tiny_recipe
from tests.training.test_degenerate import GAE

REMIX: dict[str, Any] = {
    "steps": STEPS,
    "phases": [{**MIX[0], "until": [{"type": "steps", "after": HALF}]}, {"type": "on_policy"}],
    "kl": {"weight": 0.1, "lambda_schedule": {"start": 0.9, "hold": 0, "every": 1, "drop": 0.2, "floor": 0.3}},
    # An odd number of prompts, and micro-batches so small that ranks have different numbers of them.
    "batch": {"prompts": 7, "minibatches": 2, "tokens_per_microbatch": 128},
    "optimizer": {"eps": 1e-3},  # so that rounding stays rounding
    "checkpoint": {"every": HALF},
}
# Of a seed none of whose draws lies so near the border between two tokens that rounding decides it.
PPO = REMIX | {"advantage": GAE, "seed": 3}
LORA = REMIX | {"adapter": {"type": "lora", "rank": 4, "alpha": 8}, "reincarnation": {"lora": "merge"}}
FAULTY = ("tests.faults.plant", "nan_losses=2", "--")


def run_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, updates: str = "2") -> Path:
    """The run of one process, in this one. `updates`: whose loss is NaN."""
    from remix.training.distributed import Cluster
    from remix.training.update import Updater

    for owner, name in ((Updater, "accumulate"), (Cluster, "backward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # puts back what is planted
    plant.nan_losses(updates)
    train.run(recipe)
    monkeypatch.undo()
    return Path(recipe.run_dir)


def written(recipe: Recipe, folder: Path) -> str:
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return str(folder / "recipe.yaml")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_full_weights_and_a_critic(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tiny_model, tmp_path / "one", PPO)
    one = run_alone(recipe, monkeypatch)
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates/skipped"] for row in rows] == [1, 0, 0, 0]
    path = written(recipe, tmp_path)
    for backend in ("zero2", "zero3"):
        launch(backend, [path, f"run_dir={tmp_path / backend}"], tmp_path / f"{backend}.log", module=FAULTY)
        assert list(differences(one, tmp_path / backend)) == [], backend
    # Two launches, as on two machines, go on with what one process has saved.
    cut(one, tmp_path / "multi_node")
    launch("multi_node", ["--resume", str(tmp_path / "multi_node")], tmp_path / "multi_node.log")
    assert list(differences(one, tmp_path / "multi_node")) == []
    # And what is compared sees what differs.
    rows[1]["loss/policy"] *= 1.01
    (one / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert [said.partition(" is ")[0] for said in differences(one, tmp_path / "zero2")] == ["step 1: loss/policy"]
    (shard,) = logged_steps(one)[1]
    groups = read_shards([shard])
    other = replace(groups[0].rollouts[0], response_ids=groups[0].rollouts[0].response_ids + 1)
    write_shard(shard, 1, [replace(groups[0], rollouts=(other, *groups[0].rollouts[1:])), *groups[1:]])
    draws = next(differences(one, tmp_path / "zero2"))
    assert draws.startswith(f"step 1: 1 of {sum(len(group.rollouts) for group in groups)} responses have another token")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_lora_that_is_folded_in_and_a_run_that_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what one process has saved, before the reincarnation."""
    recipe = tiny_recipe(tiny_model, tmp_path / "one", LORA)
    # The second of those after HALF, since until then there are two steps of two passes in two minibatches.
    one = run_alone(recipe, monkeypatch, updates="10")
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates/skipped"] for row in rows] == [0, 0, 1, 0]
    run_dir, log = tmp_path / "fsdp2", tmp_path / "fsdp2.log"
    cut(one, run_dir)
    launch("fsdp2", ["--resume", str(run_dir)], log, module=FAULTY)
    assert list(differences(one, run_dir)) == []


def test_the_matrix_is_whole() -> None:
    assert len(all_cases()) == 6 * 4 * 2
    files = {path.stem for path in (ROOT / "recipes" / "accelerate").glob("*.yaml")}
    assert files == {*BACKENDS, "cpu", "single_gpu"}


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def test_what_a_launch_asks_for() -> None:
    assert asked_for({}) is Backend.DDP
    assert asked_for(FSDP2) is Backend.FSDP2
    assert asked_for(ZERO) is Backend.ZERO3
    assert asked_for(ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}) is Backend.ZERO2
    for environment in ({}, FSDP2, ZERO):
        check_launch(asked_for(environment), environment)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (FSDP2 | {"FSDP_VERSION": "1"}, "fsdp_version to 2"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: recipes/accelerate/zero3_offload.yaml"),
        (FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.gradient_checkpointing; set it to false"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "fsdp_auto_wrap_policy: set it to TRANSFORMER_BASED_WRAP"),
        (FSDP2 | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision bf16: set it to 'no'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage to 2 or 3"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file"),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_configuration_that_contradicts_the_recipe_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_launch(asked_for(environment), environment)


@pytest.mark.parametrize(
    ("changes", "key", "refusing"),
    [
        ({"kl": {"estimator": "full"}}, "kl.estimator full", {Backend.FSDP2, Backend.ZERO3}),
        ({"model": {"compile": True}}, "model.compile", {Backend.FSDP2, Backend.ZERO3}),
        ({"adapter": {"type": "ia3"}}, "adapter.type ia3", {Backend.FSDP2, Backend.ZERO3}),
        (
            {"rollout": {"engine": {"type": "vllm", "own_process": True}}},
            "rollout.engine.own_process",
            {Backend.FSDP2, Backend.ZERO3},
        ),
        (
            {"continual": {"method": {"type": "average"}}, "adapter": {"type": "lora"}},
            "continual",
            {Backend.FSDP2, Backend.ZERO2, Backend.ZERO3},
        ),
        ({"adapter": {"type": "lora"}}, "", set()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_backend_cannot_do_is_refused_with_one_that_can(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], key: str, refusing: set[Backend]
) -> None:
    recipe = tiny_recipe(tiny_model, tmp_path / "run", changes)
    for backend in Backend:
        if backend in refusing:
            with pytest.raises(ValueError, match=f"^{key}") as refused:
                check_recipe(recipe, backend)
            assert backend.value in str(refused.value)
            assert "recipes/accelerate/" in str(refused.value)
        else:
            check_recipe(recipe, backend)
