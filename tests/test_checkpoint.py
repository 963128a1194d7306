"""A checkpoint is whole or absent, holds nothing of pickle, and training goes on from it bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from remix import checkpoint, durable
from remix.checkpoint import Checkpoint, load_newest, load_optimizer, load_rng, optimizer_tensors, rng_tensors, save


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 1))


def optimizer_of(module: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    first, last = list(module[0].parameters()), list(module[3].parameters())
    return torch.optim.AdamW(
        [{"params": first, "name": "policy", "lr": lr}, {"params": last, "name": "critic", "lr": 2 * lr}],
        weight_decay=0.1,
    )


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Dropout and data both draw from torch's generator."""
    for _ in range(steps):
        module(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def taken(module: nn.Module, optimizer: torch.optim.Optimizer, **state: Any) -> Checkpoint:
    tensors = {
        "model": dict(module.named_parameters()),
        "optimizer": optimizer_tensors(optimizer),
        "rng": rng_tensors(),
    }
    return Checkpoint(state, tensors)


def simple(step: int, **tensors: Tensor) -> Checkpoint:
    return Checkpoint({"step": step}, {"model": tensors or {"w": torch.full((2,), float(step))}})


def newest(run_dir: Path) -> Checkpoint | None:
    """Loaded without a warning."""
    return load_newest(run_dir, pytest.fail)


def steps_of(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step=")) for path in checkpoint.saved(run_dir)]


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    module = network()
    optimizer = optimizer_of(module)
    train(module, optimizer, 3)
    save(tmp_path, 3, taken(module, optimizer, step=3), keep=1)
    train(module, optimizer, 3)

    resumed = network()
    other = optimizer_of(resumed)
    train(resumed, other, 1)  # moments, weights and generator elsewhere than at the start
    loaded = newest(tmp_path)
    assert loaded is not None
    assert loaded.state == {"step": 3}
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            parameter.copy_(loaded.tensors["model"][name])
    load_optimizer(other, loaded.tensors["optimizer"])
    load_rng(loaded.tensors["rng"])
    train(resumed, other, 3)

    for one, two in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    states = optimizer_tensors(optimizer), optimizer_tensors(other)
    assert states[0].keys() == states[1].keys()
    assert {"0.exp_avg", "0.exp_avg_sq", "0.step", "3.exp_avg"} <= states[0].keys()
    assert states[0]["0.step"].item() == 6
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_loading_the_optimizer_leaves_the_recipe_its_settings() -> None:
    module = network()
    optimizer = optimizer_of(module, lr=1e-2)
    train(module, optimizer, 1)
    tensors = optimizer_tensors(optimizer)
    other = optimizer_of(network(), lr=5e-4)
    load_optimizer(other, tensors)
    assert [(group["name"], group["lr"]) for group in other.param_groups] == [("policy", 5e-4), ("critic", 1e-3)]


def test_an_optimizer_that_has_not_stepped_has_no_state() -> None:
    optimizer = optimizer_of(network())
    assert optimizer_tensors(optimizer) == {}
    load_optimizer(optimizer, {})
    assert optimizer.state_dict()["state"] == {}


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    odd = {
        "bf16": torch.tensor([1.0, 1e-8, -3.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "part": torch.arange(10.0)[4:6],
        "a.name.with.dots": torch.zeros(0, 4),
    }
    save(tmp_path, 1, Checkpoint({"x": [0.1, None, "é"]}, {"model": odd, "reference": {"w": torch.ones(1)}}), keep=1)
    loaded = newest(tmp_path)
    assert loaded is not None
    assert loaded.state == {"x": [0.1, None, "é"]}
    assert loaded.tensors.keys() == {"model", "reference"}
    for name, tensor in odd.items():
        back = loaded.tensors["model"][name]
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)


def test_tensors_that_share_memory_are_saved_each(tmp_path: Path) -> None:
    """Precedent and next precedent are one snapshot in a run's first step."""
    shared = torch.arange(6.0)
    sections = {"precedent": {"w": shared}, "next_precedent": {"w": shared}, "model": {"half": shared[:3]}}
    save(tmp_path, 1, Checkpoint({}, sections), keep=1)
    loaded = newest(tmp_path)
    assert loaded is not None
    assert (
        loaded.tensors["precedent"]["w"].tolist()
        == loaded.tensors["next_precedent"]["w"].tolist()
        == [0, 1, 2, 3, 4, 5]
    )
    assert loaded.tensors["model"]["half"].tolist() == [0, 1, 2]


def test_only_safetensors_and_json(tmp_path: Path) -> None:
    module = network()
    optimizer = optimizer_of(module)
    train(module, optimizer, 1)
    folder = save(tmp_path, 40, taken(module, optimizer, step=40), keep=1)
    assert folder == tmp_path / "checkpoints" / "step=000040"
    assert {file.name for file in folder.iterdir()} == {"state.json", "tensors.safetensors", "manifest.json"}
    assert json.loads((folder / "state.json").read_text()) == {"step": 40}
    assert "optimizer.0.exp_avg" in load_file(folder / "tensors.safetensors")
    # What pickle writes begins with its protocol, zipped or not.
    assert not (folder / "tensors.safetensors").read_bytes().startswith((b"PK", b"\x80"))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9, 100):
        save(tmp_path, step, simple(step), keep=2)
    # After 2 and 10 both stay; 9 comes between and pushes out 2; 100 pushes out 9.
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step=000010", "step=000100"]
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["latest", "step=000010", "step=000100"]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step=000100"
    loaded = newest(tmp_path)
    assert loaded is not None
    assert loaded.state["step"] == 100


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, simple(5, w=torch.zeros(2)), keep=3)
    save(tmp_path, 5, simple(5, w=torch.ones(2)), keep=3)
    loaded = newest(tmp_path)
    assert loaded is not None
    assert loaded.tensors["model"]["w"].tolist() == [1, 1]


def test_none_yet(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert checkpoint.saved(tmp_path) == []


@pytest.mark.parametrize("fails_in", ["save_file", "sync"])
def test_a_crash_in_between_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str) -> None:
    save(tmp_path, 1, simple(1), keep=1)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint if fails_in == "save_file" else durable, fails_in, fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, simple(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step=000001"]
    loaded = newest(tmp_path)
    assert loaded is not None
    assert loaded.tensors["model"]["w"].tolist() == [1, 1]
    # The next attempt is not in the way of the first.
    save(tmp_path, 2, simple(2), keep=1)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step=000002", "latest"}


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, simple(step), keep=1, best_step=min(step, 2))
    assert steps_of(tmp_path) == [2, 4]
    links = {name: (tmp_path / "checkpoints" / name).resolve().name for name in ("latest", "best")}
    assert links == {"latest": "step=000004", "best": "step=000002"}


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "bit of the weights": (lambda folder: flip(folder / "tensors.safetensors"), "SHA-256 differs"),
    "bit of the state": (lambda folder: flip(folder / "state.json"), "state.json has changed"),
    "bit of the manifest": (lambda folder: flip(folder / "manifest.json"), ""),
    "end of the weights": (lambda folder: truncate(folder / "tensors.safetensors"), "bytes, not the"),
    "the weights": (lambda folder: (folder / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
    "the manifest": (lambda folder: (folder / "manifest.json").unlink(), "not written to its end"),
    "a rollout shard": (lambda folder: flip(folder.parents[1] / "rollouts" / "x.parquet"), "x.parquet has changed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, damage: str) -> None:
    shard = tmp_path / "rollouts" / "x.parquet"
    shard.parent.mkdir()
    shard.write_bytes(b"rollouts")
    save(tmp_path, 1, simple(1), keep=2)
    counts_on = {checkpoint.FILES: {"rollouts/x.parquet": durable.sha256(shard)}}
    folder = save(tmp_path, 9, Checkpoint({"step": 9, **counts_on}, simple(9).tensors), keep=2)
    assert newest(tmp_path).state["step"] == 9  # type: ignore[union-attr]
    harm, says = DAMAGES[damage]
    harm(folder)
    warnings: list[str] = []
    loaded = load_newest(tmp_path, warnings.append)
    assert loaded is not None
    assert loaded.state == {"step": 1}
    (warning,) = warnings
    assert str(folder) in warning
    assert says in warning
    # Where it is out of the way, it pushes no whole one out.
    checkpoint.set_aside(tmp_path, beyond=1)
    save(tmp_path, 2, simple(2), keep=1)
    assert steps_of(tmp_path) == [2]
    assert (tmp_path / "checkpoints" / "damaged.step=000009").is_dir()


def test_nothing_whole_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, simple(1), keep=2)
    flip(folder / "tensors.safetensors")
    warnings: list[str] = []
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole"):
        load_newest(tmp_path, warnings.append)
    assert len(warnings) == 1


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, simple(1), keep=2)
    hidden = tmp_path / "checkpoints" / ".step=000010.tmp"
    hidden.mkdir()
    (hidden / "state.json").write_text("{}")
    loaded = newest(tmp_path)
    assert loaded is not None
    assert loaded.state == {"step": 1}
    checkpoint.recover(tmp_path)
    assert not hidden.exists()


def test_a_kill_between_two_renames_loses_neither(tmp_path: Path) -> None:
    """The same step saved again: the older one is out of the way, the newer not yet in place."""
    folder = save(tmp_path, 5, simple(5), keep=1)
    folder.replace(folder.with_name(".step=000005.old"))
    folder.with_name(".step=000005.tmp").mkdir()
    assert newest(tmp_path) is None
    checkpoint.recover(tmp_path)
    loaded = newest(tmp_path)
    assert loaded is not None
    assert loaded.state == {"step": 5}
    assert {path.name for path in folder.parent.iterdir()} == {"step=000005", "latest"}


def test_a_kill_before_the_links_is_made_good(tmp_path: Path) -> None:
    save(tmp_path, 1, simple(1), keep=1)
    folder = save(tmp_path, 2, simple(2), keep=2)
    (folder.parent / "latest").unlink()
    checkpoint.settle(tmp_path, keep=1, best_step=2)
    assert {path.name for path in folder.parent.iterdir()} == {"step=000002", "latest", "best"}


def test_damaged_twice_is_set_aside_twice_and_foreign_names_are_left_alone(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 6, simple(6), keep=1)
        checkpoint.set_aside(tmp_path, beyond=5)
        assert checkpoint.saved(tmp_path) == []
    (tmp_path / "checkpoints" / "step=000040.bak").mkdir()
    checkpoint.set_aside(tmp_path, beyond=0)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "damaged.step=000006",
        "latest",
        "step=000040.bak",
    }


def test_every_generator_goes_on_where_it_was() -> None:
    random.gauss(0, 1), np.random.standard_normal()  # both keep a second number back
    saved = {name: tensor.clone() for name, tensor in rng_tensors().items()}
    drawn = [(random.gauss(0, 1), np.random.standard_normal(), torch.rand(1).item()) for _ in range(3)]
    load_rng(saved)
    assert [(random.gauss(0, 1), np.random.standard_normal(), torch.rand(1).item()) for _ in range(3)] == drawn


def test_what_is_loaded_is_a_copy(tmp_path: Path) -> None:
    weight = torch.ones(3)
    folder = save(tmp_path, 1, simple(1, w=weight), keep=1)
    loaded = newest(tmp_path)
    assert loaded is not None
    loaded.tensors["model"]["w"].zero_()
    assert weight.tolist() == [1, 1, 1]
    assert load_file(folder / "tensors.safetensors")["model.w"].tolist() == [1, 1, 1]
