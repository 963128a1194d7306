"""Whole runs of a tiny model: what they leave behind, how they go on, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from remix.checkpoint import saved
from remix.errors import TrainingError
from remix.models.adapters import ADAPTER
from remix.train import main
from remix.training.finish import finish
from tests.tiny import EMBEDDED, MIX, opened, run, tiny_recipe, weights_of
from tests.training.test_degenerate import GAE, metrics_of

LORA = {"type": "lora", "rank": 4}
PHASES = [{**MIX[0], "until": [{"type": "steps", "after": 2}]}, {"type": "on_policy"}]
KL = {"weight": 0.1, "lambda_schedule": {"start": 0.9, "hold": 1, "every": 1, "drop": 0.2}}


def test_a_run_leaves_what_it_promises(tiny_model: Path, tmp_path: Path) -> None:
    changes = {"phases": MIX, "eval": {"every": 1}, "log": {"trackers": ["tensorboard"], "completions_every": 1}}
    run(tiny_recipe(tiny_model, tmp_path / "run", changes))
    folder = tmp_path / "run"
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[-1]["rollouts"] == lines[0]["rollouts/fresh"] + lines[1]["rollouts/fresh"]
    always = {
        "rollouts", "reward/mean", "eval/pass@1", "policy_lag/mean", "ratio/mean", "ratio/p95/lag=1",
        "clip_fraction/lag=0", "clip_fraction/lag=1", "ess", "ess/lag=1", "kl/reference", "kl/update", "kl/lambda",
        "entropy", "response/length", "response/truncated", "response/self_reflection", "sampler/mismatch_kl",
    }  # fmt: skip
    assert always <= lines[1].keys()
    result = json.loads((folder / "result.json").read_text())
    assert result.keys() >= {"base_pass_at_1", "final_pass_at_1", "rollouts", "steps", "seconds", "recipe"}
    assert (result["steps"], result["rollouts"]) == (2, lines[1]["rollouts"])
    assert result["final_pass_at_1"] == lines[1]["eval/pass@1"]
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert len(AutoTokenizer.from_pretrained(folder / "final")) == model.config.vocab_size
    assert "rollouts generated" in (folder / "final" / "README.md").read_text()
    table = pq.read_table(folder / "rollouts" / "step=000001.parquet")
    assert table.num_rows == lines[1]["rollouts/fresh"]
    assert set(table["policy_version"].to_pylist()) == {1}
    events = EventAccumulator(str(next(folder.glob("*/events.out.tfevents.*"))))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [0, 1]
    over_rollouts = events.Scalars("over_rollouts/reward/mean")
    assert [event.step for event in over_rollouts] == [line["rollouts"] for line in lines]
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert {row["step"] for row in completions} == {0, 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"phases": PHASES, "kl": KL},
        {"phases": PHASES, "kl": KL, "advantage": GAE},
        {"phases": PHASES, "kl": KL, "adapter": LORA},
        {"phases": PHASES, "kl": KL, "adapter": LORA, "reincarnation": {"lora": "merge"}},
        {"phases": [{**MIX[0], "until": [{"type": "steps", "after": 3}]}, {"type": "on_policy"}], "kl": KL},
    ],
    ids=["full", "ppo", "lora", "merge", "mid-phase"],
)
def test_a_resumed_run_is_the_run_it_would_have_been(tiny_model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {**changes, "steps": 4}
    whole = run(tiny_recipe(tiny_model, tmp_path / "whole", changes))
    run(tiny_recipe(tiny_model, tmp_path / "parts", {**changes, "max_steps": 2}))
    parts = run(tiny_recipe(tiny_model, tmp_path / "parts", changes), resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    without_eval = [
        [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in metrics_of(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert without_eval[0] == without_eval[1]
    for step in range(4):
        shards = [
            pq.read_table(tmp_path / name / "rollouts" / f"step={step:06d}.parquet") for name in ("whole", "parts")
        ]
        assert shards[0].equals(shards[1])


def test_what_lies_beyond_the_checkpoint_is_done_again(tiny_model: Path, tmp_path: Path) -> None:
    """A run killed after step 3 whose last checkpoint is of step 2."""
    changes = {"steps": 4, "phases": MIX, "checkpoint": {"every": 2}}
    whole = run(tiny_recipe(tiny_model, tmp_path / "whole", changes))
    recipe = tiny_recipe(tiny_model, tmp_path / "killed", changes)
    with opened(recipe) as trainer:
        for step in range(3):
            trainer._finish(step, trainer._step(step))
    assert [path.name for path in saved(tmp_path / "killed")] == ["step=000002"]
    with opened(recipe, resume=True) as trainer:
        assert trainer.state.step == 2
        trainer.state.base_evaluation = {"eval/pass@1": 0.0}
        trainer.fit()
        again = weights_of(trainer)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [line["step"] for line in metrics_of(tmp_path / "killed")] == [0, 1, 2, 3]


def test_lora_trains_the_adapter_alone_and_its_reference_is_the_base(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    with opened(tiny_recipe(tiny_model, tmp_path, {"adapter": LORA, "kl": KL, "optimizer": {"lr": 0.01}})) as t:
        trained = {name for name, p in t.policy.module.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        t.fit()
        finish(t, "test.yaml")
        rollout = t.replay.draw(
            1, step=2, window=2, distribution="uniform", rng=__import__("numpy").random.default_rng(0)
        )
        assert rollout == []  # on-policy: nothing is kept
        probe = _probe(t)
        reference = t.policy.score([probe], tokens_per_microbatch=4096, anchor=t.policy.reference)[0].logprobs
        now = t.policy.score([probe], tokens_per_microbatch=4096)[0].logprobs
        with t.policy.module.lm.disable_adapter():
            base = t.policy.score([probe], tokens_per_microbatch=4096)[0].logprobs
        assert torch.equal(reference, base)
        assert not torch.allclose(now, base, atol=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "final")
    assert loaded.peft_config["default"].r == 4
    torch.testing.assert_close(_logprobs(loaded, probe), now, atol=1e-5, rtol=1e-5)


def test_merging_at_reincarnation_leaves_a_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    changes = {
        "steps": 4, "adapter": LORA, "reincarnation": {"lora": "merge"}, "phases": PHASES, "kl": KL,
        "optimizer": {"lr": 0.003},
    }  # fmt: skip
    with opened(tiny_recipe(tiny_model, tmp_path, changes)) as t:
        base = {n: p.clone() for n, p in t.policy.module.named_parameters() if not p.requires_grad}
        t.fit()
        finish(t, "test.yaml")
        assert t.state.base_merged
        changed = [n for n, p in t.policy.module.named_parameters() if n in base and not torch.equal(p, base[n])]
        assert changed
        assert all(name.endswith("base_layer.weight") for name in changed)
        probe = _probe(t)
        now = t.policy.score([probe], tokens_per_microbatch=4096)[0].logprobs
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(_logprobs(final, probe), now, atol=1e-4, rtol=1e-4)
    assert metrics_of(tmp_path)[3]["kl/reference"] < metrics_of(tmp_path)[1]["kl/reference"]
    assert not list((tmp_path / "final").glob("adapter*"))
    assert ADAPTER not in (tmp_path / "final" / "config.json").read_text()


@pytest.mark.parametrize("adapter", [{"type": "none"}, LORA], ids=["full", "lora"])
def test_vllm_samples_from_the_trained_policy(vllm_model: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    """The recipe's other engine: after every sync its log-probs are the trainer's."""
    changes = {
        "steps": 3, "phases": MIX, "adapter": adapter, "kl": KL,
        "rollout": {"engine": {"type": "vllm"}},
    }  # fmt: skip
    run(tiny_recipe(vllm_model, tmp_path, changes))
    for line in metrics_of(tmp_path):
        assert line["sampler/probe"] < 1e-4
        assert line["sampler/mismatch_max"] < 1e-3


def test_weights_that_do_not_arrive_stop_the_run(vllm_model: Path, tmp_path: Path) -> None:
    changes = {"optimizer": {"lr": 0.03}, "rollout": {"engine": {"type": "vllm"}}}
    with opened(tiny_recipe(vllm_model, tmp_path, changes)) as t:
        t.sampler.engine.sync = lambda weights: None
        with pytest.raises(TrainingError, match="does not hold the trained weights"):
            t.fit()


def test_resume_refuses_another_recipe(tiny_model: Path, tmp_path: Path) -> None:
    run(tiny_recipe(tiny_model, tmp_path, {"max_steps": 1, "phases": MIX}))
    changed = tiny_recipe(tiny_model, tmp_path, {"phases": [{**MIX[0], "window": 3}], "seed": 7})
    with (
        pytest.raises(ValueError, match=r"phases\.0\.window was 2, is 3; seed was 0, is 7"),
        opened(changed, resume=True),
    ):
        pass


def test_two_processes_do_not_write_the_same_run(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_model, tmp_path)
    with opened(recipe):
        with pytest.raises(ValueError, match="another process is training there"), opened(recipe, resume=True):
            pass
        assert metrics_of(tmp_path) == []
    with opened(recipe, resume=True):  # the lock goes with whoever held it
        pass


class TestBadInput:
    """Each ends in one line on stderr that names the cause and the remedy, and exit status 2."""

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["optimizer.lrr=1"], "did you mean 'lr'"),
            (["steps=many"], "steps: Input should be a valid integer"),
            (["model.path=/nowhere"], "/nowhere"),
            (["tasks=[{type: jsonl, path: /nowhere.jsonl}]"], "/nowhere.jsonl"),
            (["batch.minibatches=100000"], "batch.minibatches"),
            (["prompt.max_tokens=3"], "prompt.max_tokens"),
            (["rewards=[{type: python, function: nowhere:reward}]"], "nowhere"),
        ],
    )
    def test_request(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
    ) -> None:
        recipe = str(EMBEDDED / "grpo.yaml")
        assert main([recipe, f"run_dir={tmp_path / 'run'}", *overrides]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    def test_a_run_directory_in_use(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        assert main([str(EMBEDDED / "grpo.yaml"), f"run_dir={tmp_path}"]) == 2
        assert f"--resume {tmp_path}" in capsys.readouterr().err
        assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"

    def test_nothing_to_resume(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--resume", str(tmp_path)]) == 2
        assert "no run there" in capsys.readouterr().err

    def test_a_tokenizer_of_another_model(self, tiny_model: Path, tmp_path: Path) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        folder = tmp_path / "small"
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        config = Qwen2Config(
            vocab_size=5, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained(folder)
        with (
            pytest.raises(ValueError, match="do not belong together"),
            opened(tiny_recipe(folder, tmp_path / "run")),
        ):
            pass

    def test_a_reward_that_raises(self, tiny_model: Path, tmp_path: Path) -> None:
        changes = {"rewards": [{"type": "python", "function": "tests.training.test_run:raising_reward"}]}
        with (
            pytest.raises(TrainingError, match=r"24 of 24 responses could not be scored.*raising_reward.*arithmetic/"),
            opened(tiny_recipe(tiny_model, tmp_path, changes)) as t,
        ):
            t.fit()


def raising_reward(prompt: str, response: str) -> float:
    raise KeyError("no such thing")


def _probe(t: Any) -> Any:
    from remix.training.reincarnation import _probe as of_policy

    return of_policy(t.policy)


def _logprobs(model: Any, rollout: Any) -> torch.Tensor:
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
