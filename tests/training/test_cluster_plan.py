"""The calculator for clusters against hand arithmetic, and its bytes against what is sent of real rollouts."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedDataParallelKwargs
from rich.console import Console

from remix import cli
from remix.models.policy import TokenScores
from remix.training.cluster_plan import (
    BACKENDS,
    ZERO_BUCKET,
    ClusterPlan,
    Machines,
    exchange_bytes,
    gather_bytes,
    gathered_parameters,
    group_bytes,
    microbatches,
    plan_cluster,
    read_machines,
    score_bytes,
    step_operations,
    sync_bytes,
)
from remix.training.memory import estimate_memory
from remix.training.model_shape import ModelShape, find_shape
from remix.training.parcels import take_apart
from remix.training.plan import make_plan
from remix.training.plan_view import render_cluster
from remix.types import Rollout, Sampling
from tests.tiny import ROOT, opened, tiny_recipe
from tests.training.test_plan import model_directory as model_directory
from tests.training.test_plan import recipe

ARITHMETIC = str(ROOT / "recipes" / "embedded" / "remix_grpo.yaml")


def planned(*overrides: str, on: str = "nodes=2,gpus=2") -> ClusterPlan:
    machines = read_machines(on)
    return plan_cluster(recipe(*overrides), make_plan(recipe(*overrides), machines.world_size), machines)


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_of_each_backend_by_hand() -> None:
    """1000 parameters on 4 processes: weights 4000 bytes, gradients 4000, moments 8000, logits 2800, an anchor 4000;
    12000 in the host's memory; with two blocks in all, everything is gathered."""
    found = planned("model.logits_chunk=7").backends
    bucket, live = ZERO_BUCKET * 4, 1000 * (4 + 4)
    assert {name: backend.device_bytes for name, backend in found.items()} == {
        "none": 4000 + 4000 + 8000 + 2800 + 4000 + 4000,
        "zero2": 4000 + 1000 + 2000 + 2800 + 4000 + 1000 + bucket,
        "zero3": 1000 + 1000 + 2000 + 2800 + 1000 + bucket + live + 4000,
        "fsdp2": 1000 + 1000 + 2000 + 2800 + 1000 + live + 4000,
    }
    host = {name: backend.host_bytes for name, backend in found.items()}
    assert host == {"none": 12000, "zero2": 12000, "zero3": 3000, "fsdp2": 3000}
    assert DistributedDataParallelKwargs().gradient_as_bucket_view is False  # DDP's buckets are a copy


def test_frozen_weights_are_shared_out_too(model_directory: Path) -> None:
    overrides = [f"model.path={model_directory}", "model.dtype=bfloat16", "adapter={type: lora, rank: 2}"]
    shape = find_shape(recipe(*overrides).model)
    assert shape is not None
    items = {item.name: item.bytes for item in planned(*overrides).backends["fsdp2"].items}
    assert items["frozen weights, bfloat16"] == -(-shape.parameters * 2 // 4)
    assert items["trained weights, float32"] == 5568 * 4 // 4
    # A block of the three: 12,608 parameters, in bfloat16, without gradients.
    assert shape.block is not None
    assert gathered_parameters(shape) == shape.parameters - shape.block.parameters
    assert items["gathered blocks"] == (shape.parameters - shape.block.parameters) * 2
    assert items["whole weights while it samples"] == shape.parameters * 2


def test_one_process_adds_nothing() -> None:
    plan = planned(on="nodes=1,gpus=1")
    alone = estimate_memory(recipe())
    assert plan.backends["none"].device_bytes == alone.device_bytes
    assert [backend.exchange for backend in plan.backends.values()] == [0, 0, 0, 0]
    assert {(phase.rollouts, phase.scores) for phase in plan.phases} == {(0, 0)}


# --- bytes --------------------------------------------------------------------------------------------------------


def test_exchange_of_an_optimiser_step_by_hand() -> None:
    """T = 1000, S = 4000, 3 micro-batches, 3/4 of it to other processes."""
    memory = estimate_memory(recipe())
    assert {backend: exchange_bytes(backend, memory, 3, 4) for backend in BACKENDS} == {
        "none": 3 * 8000 // 4,
        "zero2": 3 * 16000 // 4,
        "zero3": 3 * 36000 // 4,
        "fsdp2": 3 * 36000 // 4,
    }


def test_microbatches_by_hand() -> None:
    """512 responses in 2 minibatches: 64 to a process; 3 sequences of 16 + 24 tokens fit into 128."""
    plan = make_plan(recipe("batch.tokens_per_microbatch=128"), 4)
    assert [microbatches(recipe("batch.tokens_per_microbatch=128"), phase) for phase in plan.phases] == [22, 22]


def test_the_engine_is_handed(model_directory: Path) -> None:
    shape = ModelShape(1000, 1000, 10, 50)

    def handed(*overrides: str) -> int:
        return sync_bytes(
            recipe(*overrides), estimate_memory(recipe(*overrides)), find_shape(recipe(*overrides).model) or shape
        )

    vllm, bf16 = "rollout.engine={type: vllm}", "model.dtype=bfloat16"
    assert handed(bf16) == 0
    assert handed(vllm, bf16) == 4000  # float32, as they are trained
    lora = [f"model.path={model_directory}", "adapter={type: lora, rank: 2}", bf16]
    whole = find_shape(recipe(*lora).model)
    assert whole is not None
    assert handed(vllm, *lora) == whole.parameters * 2
    hot = "rollout.engine={type: vllm, lora: hot_swap}"
    assert handed(hot, *lora, "advantage={type: gae}") == 5568 * 4  # without the critic


def test_what_processes_receive_by_hand() -> None:
    """38 fresh prompts of 64 in the first phase: 10 to each of 4 processes at most, and 3 others' are received."""
    (first, second) = planned().phases
    each = (8 + 5 + 4) * 16 + 20 + 8 * ((8 + 4 + 4) * 24 + 2 * 20 + 80)
    assert group_bytes(16, 24, 8) == each
    assert (first.rollouts, second.rollouts) == (3 * 10 * each, 3 * 16 * each)
    scores = 4 * 24 + 20
    assert score_bytes(24, with_values=True) == 2 * scores
    # Proximal and precedent: 512 responses, 128 to a process; the reference: 304 fresh ones, 76 to a process.
    assert first.scores == 3 * scores * (128 + 76 + 128)
    assert planned("kl.estimator=full").phases[0].scores == 3 * scores * 128
    assert planned("advantage={type: gae}").phases[0].scores == 3 * scores * (2 * 128 + 76 + 128)
    assert first.replay == 2 * 38 * (17 * 16 + 310 + 8 * ((8 + 4 + 16) * 24 + 5 * 310 + 80))
    assert second.replay == 0
    assert gather_bytes(9, 100, 4) == 3 * 3 * 100


def sent(value: Any) -> int:
    parcel, array = take_apart(value)
    return len(pickle.dumps(parcel)) + len(array)


def test_the_bytes_are_those_that_are_sent(tiny_model: Path, tmp_path: Path) -> None:
    """Sampled by a run, and scored; and the same with responses whose tokens outweigh all else."""
    with opened(tiny_recipe(tiny_model, tmp_path)) as t:
        sampling = Sampling(t.recipe.rollout.max_tokens)
        groups = t.sampler.sample(t.stream.take(0, 6), sampling, 4, version=0)
        scores = t.policy.score([r for group in groups for r in group.rollouts], tokens_per_microbatch=4096)
    prompt = max(len(group.prompt.token_ids) for group in groups)
    longest = max(len(rollout.response_ids) for group in groups for rollout in group.rollouts)

    def worded(rollout: Rollout) -> Rollout:  # a token of a vocabulary of words; one of the tiny model's is a letter
        return replace(rollout, text="word" * len(rollout.response_ids))

    words = [replace(group, rollouts=tuple(map(worded, group.rollouts))) for group in groups]
    assert sent(groups) < sent(words)
    assert 0.7 < sent(words) / (6 * group_bytes(prompt, longest, 4)) <= 1
    assert 0.7 < sent([[score] for score in scores]) / (24 * score_bytes(longest, with_values=False)) <= 1

    def lengthened(rollout: Rollout) -> Rollout:
        ids = torch.randint(150_000, (4000,))
        return replace(rollout, response_ids=ids, sampler_logprobs=torch.rand(4000), text="word" * 4000)

    long = [replace(group, rollouts=tuple(map(lengthened, group.rollouts))) for group in groups]
    assert 0.98 < sent(long) / (6 * group_bytes(prompt, 4000, 4)) <= 1
    both = [TokenScores(torch.rand(4000), torch.rand(4000)) for _ in range(64)]
    assert 0.98 < sent(both) / (64 * score_bytes(4000, with_values=True)) <= 1


# --- time ---------------------------------------------------------------------------------------------------------


def test_operations_and_rates_by_hand() -> None:
    """1000 parameters, tied as far as is known: 512 sequences of 40 tokens, twice; scored 512 + 304 + 512."""
    plan = make_plan(recipe(), 4)
    shape = find_shape(recipe().model)
    assert shape is not None
    operations = 1000 * (6 * 20480 * 2 + 2 * (512 + 304 + 512) * 40)
    assert step_operations(recipe(), plan.phases[0], shape) == operations
    again = step_operations(recipe("model.gradient_checkpointing=true"), plan.phases[0], shape)
    assert again == operations + 1000 * 2 * 20480 * 2
    separate = step_operations(recipe("advantage={type: gae, critic: {type: separate}}"), plan.phases[0], shape)
    assert (
        separate == operations + 1011 * (6 * 20480 * 2 + 2 * 0) if not plan.phases[0].anchor_forwards.critic else True
    )
    (first, _) = planned(on="nodes=2,gpus=2,tflops=0.001,seconds=1,samplers=2").phases
    seconds = operations / (0.001e12 * 4)
    assert first.trainer_seconds == pytest.approx(seconds)
    assert first.rate == pytest.approx(304 * 24 / seconds)
    assert first.rate_for_step == pytest.approx(304 * 24 / (1 - seconds))
    assert planned(on="nodes=2,gpus=2,tflops=0.001,seconds=0.01").phases[0].rate_for_step is None


# --- the command --------------------------------------------------------------------------------------------------


def shown(plan: ClusterPlan) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_cluster(plan))
    return re.sub(r" +", " ", console.export_text())


def test_the_view() -> None:
    text = shown(planned(on="nodes=2,gpus=2,seconds=60,samplers=2"))
    for line in (
        "On 2 x 2 GPUs, and 2 GPUs that sample",
        "backend none zero2 zero3 fsdp2",
        "gradients 3.9 KiB 1,000.0 B 1,000.0 B 1,000.0 B",
        "prompts sent none: all draw the same none: all draw the same",
        "for steps of 60 s 122 tokens/s, 61 a GPU",
    ):
        assert line in text
    assert "no rate is enough" in shown(planned(on="nodes=1,gpus=1,tflops=0.000001,seconds=1"))
    unknown = shown(planned("model={path: org/not-on-this-machine}"))
    assert "weights to each engine unknown" in unknown
    assert "rollouts received" in unknown


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--cluster", "nodes=2,gpus=4", ARITHMETIC]) == 0
    assert "On 2 x 4 GPUs" in capsys.readouterr().out
    assert cli.main(["plan", "--cluster", "nodes=2,gpus=4", "--json", ARITHMETIC]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["world_size"] == 8
    assert plan["cluster"]["machines"] == asdict(Machines(2, 4))
    sft = str(ROOT / "recipes" / "embedded" / "continual_shapes_sft.yaml")
    assert cli.main(["plan", "--cluster", "nodes=1,gpus=2", "--json", sft]) == 0
    assert {task["cluster"]["sync"] for task in json.loads(capsys.readouterr().out).values()} == {0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nodes=4"], "--cluster nodes=4: gpus is missing; for example nodes=4,gpus=8"),
        (["nodes=4,gups=8"], "--cluster gups=8: no such key; did you mean 'gpus'?"),
        (["nodes=four,gpus=8"], "--cluster nodes=four: expected nodes=a whole number, for example nodes=8"),
        (["nodes=0,gpus=8"], "--cluster nodes=0: nodes must be above 0"),
        (["nodes=1,gpus=8,seconds=-3"], "--cluster seconds=-3: expected seconds=a number"),
        (["nodes=1,gpus=8,gpus=8"], "--cluster: gpus is there twice; give it once"),
        (["nodes=1,gpus=8", "--processes", "4"], "--processes 4 and --cluster with 8: leave out --processes"),
        (["nodes=1000,gpus=8"], "responses for 8000 processes: raise batch.prompts, or launch fewer processes"),
    ],
)
def test_bad_input(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--cluster", *words, ARITHMETIC]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
