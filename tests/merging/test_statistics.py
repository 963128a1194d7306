"""Fisher information and Gram matrices of parents, from rollout logs on disk, against autograd and layers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from remix.merging.methods import fisher, regmean
from remix.replay import shard_path, write_shard
from remix.types import Prompt, Rollout, RolloutGroup, Score
from tests.merging.making import lora, make_adapter, make_model, merged_by_peft, remix_merge, stored

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
        "pictures": "its prompts have images",
        "torn": "no whole rollout log",
        "foreign": "token 5000 is not one of its",
    }.items():
        assert (
            remix_merge(tmp_path / "out", tiny_untied_model, "fisher", [parent], "--rollouts", str(tmp_path / run)) == 2
        )
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
