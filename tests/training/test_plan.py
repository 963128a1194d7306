"""The numbers of the preflight against hand arithmetic, its memory against real models, its refusals by message."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from remix.config import Recipe, parse_recipe
from remix.config.recipe import _apply
from remix.training.memory import estimate_memory
from remix.training.plan import AnchorForwards, Span, make_plan
from remix.training.plan_view import human_bytes, human_count, render
from remix.training.refusals import check_model_directory

RECIPE = """
run_dir: runs/test
steps: 100
model: {path: org/some-model, size: {parameters: 1000, hidden_size: 10, num_layers: 2, vocab_size: 50}}
tasks: [{type: arithmetic, size: 4096}]
prompt: {max_tokens: 16}
rewards: [{type: exact_match}]
rollout: {group_size: 8, max_tokens: 24}
batch: {prompts: 64, minibatches: 2}
kl: {lambda_schedule: {start: 1.0, hold: 50, every: 10, drop: 0.1, floor: 0.5}}
phases:
  - {type: mix_policy, until: [{type: steps, after: 40}]}
  - {type: on_policy}
eval: {every: 30, prompts: 10, samples: 4}
"""

TINY: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def recipe(*overrides: str) -> Recipe:
    data = yaml.safe_load(RECIPE)
    for override in overrides:
        _apply(data, override)
    return parse_recipe(data)


# --- batches and totals -------------------------------------------------------------------------------------------


def test_a_mix_phase_step_by_hand() -> None:
    mix, on = make_plan(recipe()).phases
    # 64 prompts x 8 = 512 rollouts; p = 0.4 of 64 prompts is 25.6, so 26 replayed and 38 fresh: 304 + 208.
    assert (mix.prompts, mix.group_size, mix.rollouts) == (64, 8, 512)
    assert (mix.fresh_prompts, mix.replayed_prompts) == (38, 26)
    assert (mix.fresh_rollouts, mix.replayed_rollouts) == (304, 208)
    assert (on.fresh_rollouts, on.replayed_rollouts) == (512, 0)
    # 2 passes x 2 minibatches of 256; 512 x (16 + 24) tokens.
    assert (mix.utd_ratio, mix.minibatches, mix.optimizer_steps, mix.rollouts_per_minibatch) == (2, 2, 4, 256)
    assert (on.optimizer_steps, mix.tokens) == (2, 20480)
    assert (mix.start, mix.steps, on.start, on.steps) == (Span(0, 0), Span(40, 40), Span(40, 40), Span(60, 60))
    assert (mix.until, on.until) == (("40 steps",), ())


def test_the_whole_run_by_hand() -> None:
    plan = make_plan(recipe())
    assert (plan.steps, plan.of_steps) == (100, 100)
    assert plan.optimizer_steps == Span(280, 280)  # 40 x 4 + 60 x 2
    # Step 0 finds replay empty: 512. 39 steps of 304, 60 of 512.
    assert plan.rollouts == Span(512 + 39 * 304 + 60 * 512, 512 + 39 * 304 + 60 * 512) == Span(43088, 43088)
    # Before, after 30, 60, 90 and 100.
    assert (plan.evaluations, plan.evaluation_rollouts) == (5, 200)


def test_uneven_minibatches_and_processes_round_up() -> None:
    phase = make_plan(recipe("batch.minibatches=3"), world_size=4).phases[0]
    assert (phase.rollouts_per_minibatch, phase.rollouts_per_process) == (171, 43)  # 512 / 3 = 170.67; 171 / 4 = 42.75


def test_max_steps_cuts_the_run_not_the_plan() -> None:
    plan = make_plan(recipe("max_steps=30"))
    assert (plan.steps, plan.of_steps) == (30, 100)
    assert [phase.steps for phase in plan.phases] == [Span(30, 30), Span(0, 0)]
    assert plan.rollouts == Span(512 + 29 * 304, 512 + 29 * 304)
    nothing = make_plan(recipe("max_steps=0"))
    assert (nothing.rollouts, nothing.evaluations) == (Span(0, 0), 1)


def test_a_later_mix_phase_starts_all_fresh_only_where_replay_is_emptied() -> None:
    phases = "phases=[{type: on_policy, until: [{type: steps, after: 10}]}, {type: mix_policy}]"
    assert make_plan(recipe(phases)).phases[1].first_step_rollouts == 512
    assert make_plan(recipe(phases, "reincarnation.empty_replay=false")).phases[1].first_step_rollouts == 304


def test_a_trigger_on_measurements_gives_bounds() -> None:
    plan = make_plan(recipe("phases.0.until=[{type: reward_plateau, window: 10}, {type: steps, after: 40}]"))
    mix, on = plan.phases
    assert (mix.steps, on.start, on.steps) == (Span(20, 40), Span(20, 40), Span(60, 80))  # two windows of 10 at least
    # Fewest rollouts with the longest mix phase, most with the shortest: 512 + 19 x 304 + 80 x 512 = 47248.
    assert plan.rollouts == Span(43088, 47248)
    assert plan.optimizer_steps == Span(20 * 4 + 80 * 2, 40 * 4 + 60 * 2)


def test_a_trigger_that_may_never_fire() -> None:
    mix, on = make_plan(recipe("phases.0.until=[{type: kl_budget, nats: 0.1}]")).phases
    assert (mix.steps, on.steps) == (Span(1, 100), Span(0, 99))


def test_a_rollouts_trigger_is_counted_in_steps() -> None:
    # 512 + n x 304 >= 5000 needs n = 15 (512 + 4560 = 5072): 16 steps.
    assert make_plan(recipe("phases.0.until=[{type: rollouts, after: 5000}]")).phases[0].steps == Span(16, 16)
    # With one refill round at most twice as many a step: 1024 + n x 608 >= 5000 needs n = 7: 8 steps.
    refilled = recipe("phases.0.until=[{type: rollouts, after: 5000}]", "rollout.refill.max_rounds=1")
    assert make_plan(refilled).phases[0].steps == Span(8, 16)


def test_refill_is_bounded() -> None:
    plan = make_plan(recipe("rollout.refill.max_rounds=3"))
    assert (plan.phases[0].refill_rollouts, plan.refill_rollouts) == (3 * 304, 3 * 43088)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], AnchorForwards(proximal=512, reference=304, precedent=512, critic=0)),
        (["kl.lambda_schedule.drop=0"], AnchorForwards(512, 304, 0, 0)),
        (["kl.weight=0"], AnchorForwards(512, 0, 0, 0)),
        (["batch.minibatches=1"], AnchorForwards(0, 304, 512, 0)),  # the first update says them
        (["batch.minibatches=1", "advantage={type: gae}"], AnchorForwards(512, 304, 512, 0)),
        (["kl.place=reward"], AnchorForwards(512, 304, 304, 0)),
        (["kl.estimator=full"], AnchorForwards(512, 1024, 1024, 0)),  # the whole batch, at each of 2 passes
        (["advantage={type: gae}"], AnchorForwards(512, 304, 512, 0)),
        (["advantage={type: gae, critic: {type: separate}}"], AnchorForwards(512, 304, 512, 512)),
    ],
)
def test_anchor_forwards(overrides: list[str], expected: AnchorForwards) -> None:
    assert make_plan(recipe(*overrides)).phases[0].anchor_forwards == expected


# --- memory -------------------------------------------------------------------------------------------------------


def test_full_weights_by_hand() -> None:
    """1000 parameters in float32 = 4000 bytes each time."""
    memory = estimate_memory(recipe("model.logits_chunk=7"))
    assert {item.name: item.bytes for item in memory.items} == {
        "trained weights, float32": 4000,
        "gradients": 4000,
        "AdamW moments": 8000,
        "logits of a chunk": 7 * 50 * 4 * 2,
        "anchor while it scores": 4000,
        "reference snapshot": 4000,
        "precedent snapshots": 8000,
    }
    assert (memory.device_bytes, memory.host_bytes) == (4000 + 4000 + 8000 + 2800 + 4000, 12000)
    assert (memory.parameters, memory.trained) == (1000, 1000)


def test_critics_and_engine_by_hand() -> None:
    shared = estimate_memory(recipe("advantage={type: gae}"))
    assert shared.trained == 1000 + 10 + 1
    separate = estimate_memory(
        recipe(
            "advantage={type: gae, critic: {type: separate}}",
            "model.dtype=bfloat16",
            "rollout.engine={type: vllm, kv_cache_gib: 0.5}",
        )
    )
    items = {item.name: item.bytes for item in separate.items}
    assert items["critic, float32"] == 1011 * 4
    assert items["AdamW moments"] == 2011 * 8
    assert items["vLLM weights, bfloat16"] == 2000
    assert items["vLLM cache"] == 2**29


def test_no_kl_no_anchors() -> None:
    assert estimate_memory(recipe("kl.weight=0")).host_bytes == 0
    assert estimate_memory(recipe("kl.lambda_schedule.drop=0")).host_bytes == 4000


def test_adapters_leave_the_base_frozen(model_directory: Path) -> None:
    overrides = [f"model.path={model_directory}", "model.dtype=bfloat16", "adapter={type: lora, rank: 2}"]
    memory = estimate_memory(recipe(*overrides))
    # A layer: q 64+64, k and v 64+32 each, o 64+64, gate, up, down 64+96 each = 928; x 3 layers x rank 2 = 5568.
    assert memory.trained == 928 * 3 * 2 == 5568
    assert memory.parameters is not None
    items = {item.name: item.bytes for item in memory.items}
    assert items["frozen weights, bfloat16"] == memory.parameters * 2
    assert items["gradients"] == items["reference snapshot"] == 5568 * 4


def test_unknown_memory_names_the_key() -> None:
    memory = estimate_memory(recipe("model={path: org/not-on-this-machine}"))
    assert memory.items == ()
    assert memory.unknown is not None
    assert "model.size" in memory.unknown
    assert "config.json" in (estimate_memory(recipe("adapter.type=lora")).unknown or "")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(Qwen2Config(**TINY, max_position_embeddings=64, tie_word_embeddings=True)).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["batch.minibatches=100"], 8, "batch.minibatches 100 leaves 5 of 512 .* 8 processes: set it to 64 or less"),
        (["batch.prompts=4", "rollout.group_size=2"], 9, "8 responses for 9 processes: raise batch.prompts"),
        (["batch.tokens_per_microbatch=39"], 1, "one longest sequence of 40 .*: set it to 40 or more"),
        (["tasks.0.size=63"], 1, "batch.prompts 64 exceeds the 63 training problems"),
        (["tasks=[{type: hub, path: org/data, limit: 40}]"], 1, "batch.prompts 64 exceeds the 40 training problems"),
        (["phases.0.until.0.after=100"], 1, "phases.1 never starts: .* after step 100 .*: lower phases.0.until"),
        (["phases.0.until=[{type: rollouts, after: 99999}]"], 1, "phases.1 never starts"),
        (["optimizer.warmup_steps=100"], 1, "optimizer.warmup_steps 100 lasts the whole run"),
        (["adapter={type: lora, rank: 11}"], 1, "adapter.rank 11 exceeds the model's hidden size 10"),
        (
            ["rollout.engine={type: vllm, own_process: true, timeout: 1800}"],
            2,
            r"rollout.engine.timeout is not below faults.rank_timeout \(1800 s\): .* Lower the one or raise the other",
        ),
        (["model.path=/no/such/model"], 1, "model.path: /no/such/model: no such directory"),
        (
            ["advantage={type: gae, critic: {type: separate, path: ./nowhere}}"],
            1,
            "advantage.critic.path: nowhere: no such directory",
        ),
    ],
)
def test_contradictions(overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(recipe(*overrides), world_size)


def test_one_process_waits_for_its_engine_as_long_as_it_likes() -> None:
    make_plan(recipe("rollout.engine={type: vllm, own_process: true, timeout: 9000}"), 1)
    make_plan(recipe("rollout.engine={type: vllm, own_process: true}"), 2)  # as it is by itself


def test_what_only_the_model_tells(model_directory: Path) -> None:
    local = f"model.path={model_directory}"
    with pytest.raises(ValueError, match=r"rollout\.max_tokens 60 exceeds the model's 64 positions"):
        make_plan(recipe(local, "rollout.max_tokens=60"))
    with pytest.raises(ValueError, match="no matrix of the model is called 'q_prj'; did you mean 'q_proj'"):
        make_plan(recipe(local, "adapter={type: lora, targets: [q_prj, v_proj]}"))
    make_plan(recipe(local, "adapter={type: lora, targets: [q_proj, v_proj]}"))


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"batch\.tokens_per_microbatch") as raised:
        make_plan(recipe("batch.tokens_per_microbatch=39", "tasks.0.size=63"))
    assert len(str(raised.value).splitlines()) == 2


def test_limits_bound_only_where_all_are_known() -> None:
    make_plan(recipe("tasks=[{type: arithmetic, size: 8}, {type: hub, path: org/data}]"))


def test_check_model_directory(model_directory: Path, tmp_path: Path) -> None:
    check_model_directory(model_directory)
    expected = ["no config.json", "no weights", "no tokenizer"]
    for step, name in enumerate(["config.json", "model.safetensors", "tokenizer.json"]):
        with pytest.raises(ValueError, match=expected[step]):
            check_model_directory(tmp_path)
        (tmp_path / name).write_bytes((model_directory / name).read_bytes())
    check_model_directory(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="2 of 2 weight files are missing, first model-00001"):
        check_model_directory(tmp_path)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        check_model_directory(tmp_path)


# --- what is shown ------------------------------------------------------------------------------------------------


def shown(*overrides: str, world_size: int = 1) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(make_plan(recipe(*overrides), world_size)))
    return re.sub(r" +", " ", console.export_text())


def test_render() -> None:
    text = shown(world_size=4)
    for line in (
        "fresh rollouts 304 512",
        "training steps 40 (0 to 39) 60 (40 to 99)",
        "rollouts a minibatch 256, 64 a process 256, 64 a process",
        "rollouts 43,088",
        "reference snapshot 3.9 KiB",
        "4 processes",
    ):
        assert line in text
    assert "all its possible ends" not in text


def test_render_bounds_refill_and_unreached_phases() -> None:
    text = shown("phases.0.until=[{type: kl_budget, nats: 0.1}]", "rollout.refill.max_rounds=1")
    assert "1 to 100" in text
    assert "KL above 0.1 nats" in text
    assert "refill, at most" in text
    assert "all its possible ends" in text
    assert "not in this run" in shown("max_steps=10")
    assert "10 of 100 (max_steps)" in shown("max_steps=10")
    assert "set model.size" in shown("model={path: org/not-on-this-machine}")


def test_units() -> None:
    assert [human_count(n) for n in (0, 999, 9999, 594432, 1777088000)] == ["0", "999", "9,999", "594 k", "1.78 B"]
    assert [human_bytes(n) for n in (1, 1536, 2**40)] == ["1.0 B", "1.5 KiB", "1,024.0 GiB"]


def test_a_plan_is_json() -> None:
    assert json.loads(json.dumps(asdict(make_plan(recipe()))))["rollouts"] == {"low": 43088, "high": 43088}
