"""Fisher information and Gram matrices of parents, from rollout logs on disk, against autograd and layers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from remix.merging.methods import fisher, regmean
from remix.merging.statistics import own_rollouts
from remix.replay import shard_path, write_shard
from remix.tasks.images import open_image
from remix.train import run as train
from remix.types import Prompt, Rollout, RolloutGroup, Score
from tests.merging.making import lora, make_adapter, make_model, merged_by_peft, remix_merge, stored
from tests.tiny import EMBEDDED, make_picture_task, tiny_recipe

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"


def run_of(folder: Path, seed: int, images: tuple[str, ...] = ()) -> list[Tensor]:
    """A run directory with three steps of rollouts; the newest four, newest step first, as whole sequences."""
    generator = torch.Generator().manual_seed(seed)
    sequences = {}
    for step in range(3):
        groups = []
        for index in range(2):
            prompt = torch.randint(3, 90, (3 + index,), generator=generator)
            response = torch.randint(3, 90, (4 + step,), generator=generator)
            rollout = Rollout(prompt, response, torch.zeros(len(response)), step, "stop", 0, "x", Score(1.0, "correct"))
            groups.append(RolloutGroup(Prompt(f"p/{index}", "x", "y", "p", tuple(prompt.tolist()), images), (rollout,)))
            sequences[step, index] = torch.cat([prompt, response])
        write_shard(shard_path(folder, step), step, groups)
    return [sequences[step, index] for step in (2, 1) for index in (0, 1)]


def starts() -> list[int]:
    return [3, 4, 3, 4]


def loaded(base: Path, state: dict[str, Tensor]) -> torch.nn.Module:
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lm.load_state_dict(state)
    return lm.eval()  # type: ignore[no-any-return]


def fisher_by_hand(lm: torch.nn.Module, sequences: list[Tensor], name: str) -> Tensor:
    total = torch.zeros_like(lm.get_parameter(name))
    for ids, start in zip(sequences, starts(), strict=True):
        lm.zero_grad()
        logprobs = lm(input_ids=ids[None]).logits[0].log_softmax(-1)
        torch.stack([logprobs[t - 1, ids[t]] for t in range(start, len(ids))]).sum().backward()
        total += lm.get_parameter(name).grad ** 2
    return total / len(sequences)


def test_fisher_of_adapters(tiny_untied_model: Path, tmp_path: Path) -> None:
    parents = [make_adapter(tiny_untied_model, tmp_path / n, lora(modules_to_save=["input_layernorm"]), seed=s)
               for s, n in enumerate("ab")]  # fmt: skip
    sequences = [run_of(tmp_path / f"run_{parent.name}", seed) for seed, parent in enumerate(parents)]
    options = ["--rollouts", *(str(tmp_path / f"run_{parent.name}") for parent in parents), "--samples", "4"]
    assert remix_merge(tmp_path / "out", tiny_untied_model, "fisher", parents, *options, "--weights", "1", "3") == 0
    states = [merged_by_peft(tiny_untied_model, parent) for parent in parents]
    base = stored(tiny_untied_model)
    for name in (Q, NORM):
        fishers = [fisher_by_hand(loaded(tiny_untied_model, state), own, name)
                   for state, own in zip(states, sequences, strict=True)]  # fmt: skip
        assert all(found.max() > 0 for found in fishers)
        expected = fisher(base[name], [state[name] - base[name] for state in states], [1, 3], fishers=fishers)
        torch.testing.assert_close(stored(tmp_path / "out")[name], expected, atol=2e-5, rtol=0)
        plain = base[name] + (states[0][name] - base[name]) / 4 + (states[1][name] - base[name]) * 3 / 4
        assert (plain - expected).abs().max() > 1e-3


def test_regmean_of_models(tiny_model: Path, tmp_path: Path) -> None:
    """The inputs of a first layer's projection are the normed embeddings of all tokens."""
    parents = [make_model(tiny_model, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for parent in parents:
        for file in tiny_model.glob("token*"):
            (parent / file.name).write_bytes(file.read_bytes())
    sequences = [run_of(tmp_path / f"run_{parent.name}", seed) for seed, parent in enumerate(parents)]
    options = ["--rollouts", *(str(tmp_path / f"run_{parent.name}") for parent in parents), "--samples", "4"]
    assert remix_merge(tmp_path / "out", tiny_model, "regmean", parents, *options, kind="--models") == 0
    base, states, grams = stored(tiny_model), [stored(parent) for parent in parents], []
    for parent, own in zip(parents, sequences, strict=True):
        model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).model
        x = model.layers[0].input_layernorm(model.embed_tokens(torch.cat(own))).detach()
        grams.append(x.T @ x / len(x))
    tasks = [state[Q] - base[Q] for state in states]
    expected = regmean(base[Q], tasks, [1, 1], grams=grams)
    torch.testing.assert_close(stored(tmp_path / "out")[Q], expected, atol=2e-5, rtol=0)
    assert (expected - base[Q] - (tasks[0] + tasks[1]) / 2).abs().max() > 1e-3
    mean = base[NORM] + (states[0][NORM] - base[NORM]) / 2 + (states[1][NORM] - base[NORM]) / 2
    torch.testing.assert_close(stored(tmp_path / "out")[NORM], mean, atol=1e-6, rtol=0)


def test_rollouts_that_do_not_serve(
    tiny_untied_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = make_adapter(tiny_untied_model, tmp_path / "a", lora(), seed=1)
    run_of(tmp_path / "pictures", 0, images=("x.png",))
    shard = shard_path(tmp_path / "torn", 0)
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"PAR1")
    ids = torch.tensor([3, 4])
    rollout = Rollout(ids, torch.tensor([5000]), torch.zeros(1), 0, "stop", 0, "x", Score(1.0, "correct"))
    group = RolloutGroup(Prompt("p", "x", "y", "p"), (rollout,))
    write_shard(shard_path(tmp_path / "foreign", 0), 0, [group])
    for run, message in {
        "pictures": "a text model, and the task has images",
        "torn": "no whole rollout log",
        "foreign": "token 5000 is not one of its",
    }.items():
        assert (
            remix_merge(tmp_path / "out", tiny_untied_model, "fisher", [parent], "--rollouts", str(tmp_path / run)) == 2
        )
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


# --- vision-language models ---------------------------------------------------------------------------------------

SEEN = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
BETWEEN = "multi_modal_projector.linear_1.weight"
READ = "language_model.model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def seeing_runs(tiny_vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on pictures, with the adapters and the rollouts that they leave."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        changes = {
            "seed": seed, "steps": 1, "tasks": [make_picture_task(folder / "task")], "prompt": {"max_tokens": 24},
            "adapter": {"type": "lora", "rank": 4, "targets": "all-linear"}, "optimizer": {"lr": 0.3},
        }  # fmt: skip
        train(tiny_recipe(tiny_vision_model, folder / str(seed), changes))
    return [folder / str(seed) for seed in range(2)]


def seeing(base: Path, run_dir: Path) -> Any:
    lm = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(lm, run_dir / "final").merge_and_unload().requires_grad_().eval()


def looked_at(base: Path, rollout: Rollout) -> dict[str, Tensor]:
    pixels = AutoProcessor.from_pretrained(base).image_processor
    images = [open_image(reference) for reference in rollout.images]
    shown = {"pixel_values": pixels(images, return_tensors="pt")["pixel_values"]} if images else {}
    return {"input_ids": torch.cat([rollout.prompt_ids, rollout.response_ids])[None], **shown}


def test_fisher_of_adapters_that_saw_pictures(tiny_vision_model: Path, seeing_runs: list[Path], tmp_path: Path) -> None:
    """The vision tower's too. The token that stands for pictures has no probability, as in the runs."""
    options = ["--rollouts", *map(str, seeing_runs), "--samples", "6"]
    parents = [folder / "final" for folder in seeing_runs]
    assert remix_merge(tmp_path / "out", tiny_vision_model, "fisher", parents, *options) == 0
    base, found = stored(tiny_vision_model), stored(tmp_path / "out")
    states, information = [], []
    for folder in seeing_runs:
        lm, rollouts = seeing(tiny_vision_model, folder), own_rollouts(str(folder), 6)
        assert {len(rollout.images) for rollout in rollouts} > {0}
        parameters = {
            SEEN: lm.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight,
            BETWEEN: lm.model.multi_modal_projector.linear_1.weight,
            READ: lm.model.language_model.layers[1].mlp.down_proj.weight,
        }
        squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for rollout in rollouts:
            lm.zero_grad()
            logits = lm(**looked_at(tiny_vision_model, rollout)).logits[0, len(rollout.prompt_ids) - 1 : -1]
            logits = logits[:, torch.arange(logits.shape[1]) != lm.config.image_token_id]  # the last of them
            assert int(rollout.response_ids.max()) < logits.shape[1]
            logits.log_softmax(-1)[range(len(logits)), rollout.response_ids].sum().backward()
            for name, parameter in parameters.items():
                squares[name] += 0 if parameter.grad is None else parameter.grad**2 / len(rollouts)
        states.append({name: parameter.detach() for name, parameter in parameters.items()})
        information.append(squares)
    for name in (SEEN, BETWEEN, READ):
        tasks = [state[name] - base[name] for state in states]
        expected = fisher(base[name], tasks, [1, 1], fishers=[squares[name] for squares in information])
        torch.testing.assert_close(found[name], expected, atol=2e-5, rtol=0)
        assert (expected - base[name] - (tasks[0] + tasks[1]) / 2).abs().max() > 1e-3


def test_regmean_of_adapters_that_saw_pictures(
    tiny_vision_model: Path, seeing_runs: list[Path], tmp_path: Path
) -> None:
    """What the projector's first layer sees are the vision tower's patches."""
    options = ["--rollouts", *map(str, seeing_runs), "--samples", "6"]
    parents = [folder / "final" for folder in seeing_runs]
    assert remix_merge(tmp_path / "out", tiny_vision_model, "regmean", parents, *options) == 0
    base, grams, tasks = stored(tiny_vision_model), [], []
    for folder in seeing_runs:
        lm = seeing(tiny_vision_model, folder)
        shown = [looked_at(tiny_vision_model, rollout) for rollout in own_rollouts(str(folder), 6)]
        pixels = torch.cat([inputs["pixel_values"] for inputs in shown if "pixel_values" in inputs])
        x = lm.model.vision_tower(pixels).last_hidden_state[:, 1:].flatten(0, 1).detach()  # without the class token
        grams.append(x.T @ x / len(x))
        tasks.append(lm.model.multi_modal_projector.linear_1.weight.detach() - base[BETWEEN])
    expected = regmean(base[BETWEEN], tasks, [1, 1], grams=grams)
    torch.testing.assert_close(stored(tmp_path / "out")[BETWEEN], expected, atol=2e-5, rtol=0)
    assert (expected - base[BETWEEN] - (tasks[0] + tasks[1]) / 2).abs().max() > 1e-3


def test_experts_in_one_have_no_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "base")
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run_of(tmp_path / "run", 0)
    whole = make_model(tmp_path / "base", tmp_path / "whole", seed=1)
    tokenizer.save_pretrained(whole)
    options = ["--rollouts", str(tmp_path / "run"), "--samples", "2"]
    for method in ("fisher", "regmean"):
        assert remix_merge(tmp_path / "out", tmp_path / "base", method, [whole], *options, kind="--models") == 2
        message = capsys.readouterr().err
        assert "which transformers makes part of model.layers.0.mlp.experts.down_proj" in message
        assert "no statistics are taken of such tensors" in message
    assert not (tmp_path / "out").exists()
    beside = make_adapter(tmp_path / "base", tmp_path / "beside", lora(target_modules=["q_proj"]), seed=1)
    assert remix_merge(tmp_path / "out", tmp_path / "base", "fisher", [beside], *options) == 0
    torch.testing.assert_close(stored(tmp_path / "out")[Q], merged_by_peft(tmp_path / "base", beside)[Q])
