"""What is counted of activations against what autograd keeps, and what `auto` makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from remix.config import Recipe
from remix.tracking.progress import Progress
from remix.training.activations import choose_checkpointing, estimate_activations
from remix.training.backends import Backend
from remix.training.build import open_trainer
from remix.training.distributed import Cluster
from remix.training.memory import estimate_memory
from remix.training.model_shape import find_shape
from remix.training.plan import make_plan
from tests.models.test_packing import policy_of, response
from tests.tiny import opened, tiny_recipe

GIB = 2**30
ROLLOUTS = [response([1] * 16, 24, seed) for seed in range(24)]
LORA = {"type": "lora", "rank": 4}


def kept(policy: Any) -> int:
    """Bytes that autograd holds for the backward of a row, but for the parameters themselves."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in policy.module.parameters()}
    storages = dict[int, tuple[int, Tensor]]()  # with the tensor, or its place would be taken by another's

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    from remix.models.packing import allow_packing
    from remix.models.policy import token_tensors

    assert allow_packing(policy.module.backbones[0])
    policy.packs = True
    policy.module.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.module(*token_tensors(ROLLOUTS), 1.0, packed=policy.packed(ROLLOUTS))
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("adapter", [{"type": "none"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_counted_is_what_is_kept(
    tiny_untied_model: Path, tmp_path: Path, adapter: dict[str, Any], dtype: str
) -> None:
    """And with gradient checkpointing blocks really keep less, packed and under an adapter."""
    held = []
    for on in (False, True):
        model = {"path": str(tiny_untied_model), "dtype": dtype, "gradient_checkpointing": on}
        held.append(kept(policy_of(tiny_untied_model, tmp_path, model=model, adapter=adapter)))
    places = 16 + 24 * 23
    recipe = tiny_recipe(
        tiny_untied_model,
        tmp_path,
        {"model": {"dtype": dtype}, "adapter": adapter, "batch": {"tokens_per_microbatch": places, "prompts": 99}},
    )
    shape = find_shape(recipe.model)
    assert shape is not None
    counted = estimate_activations(recipe, shape)
    assert 0.85 < counted.kept / held[0] < 1.35
    # The blocks' inputs alone; what else is kept lies outside of them: head, norm, embedding, precision.
    assert held[1] < held[0] / 4
    assert counted.checkpointed < counted.kept


def auto(path: Path, tmp_path: Path, **changes: Any) -> Recipe:
    return tiny_recipe(path, tmp_path, {"model": {"gradient_checkpointing": "auto"}, **changes})


def test_auto_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """3 minibatches' worth: 12 responses of 40 tokens in a micro-batch, 2 blocks of widths 64, 64 and 96:
    480 x 2 x 4 x (8·64 + 9·64 + 4·96) = 5,652,480 bytes."""
    recipe = auto(tiny_model, tmp_path)
    memory = estimate_memory(recipe)
    shape = find_shape(recipe.model)
    assert shape is not None
    assert estimate_activations(recipe, shape).kept == 5_652_480
    held = memory.device_bytes
    enough = int((held + 5_652_480) / 0.9) + 2
    assert not choose_checkpointing(recipe, memory, (enough, "a GPU")).on
    less = choose_checkpointing(recipe, memory, (enough - 4, "a GPU"))
    assert less.on
    assert "0.01 GiB of activations do not fit into the 0.01 GiB that are left of a GPU" in less.why
    # Main memory holds the snapshots too, and vLLM a share of a GPU unless it sleeps.
    assert choose_checkpointing(recipe, memory, (enough, "the host's memory")).on
    engine: dict[str, Any] = {"type": "vllm", "memory_fraction": 0.5}
    vllm = auto(tiny_model, tmp_path, rollout={"engine": engine})
    assert choose_checkpointing(vllm, estimate_memory(vllm), (enough, "a GPU")).on
    assert not choose_checkpointing(vllm, estimate_memory(vllm), (2 * enough, "a GPU")).on
    asleep = auto(tiny_model, tmp_path, rollout={"engine": engine | {"sleep": True}})
    assert not choose_checkpointing(asleep, estimate_memory(asleep), (enough, "a GPU")).on


def test_auto_where_nothing_is_to_be_decided(tiny_model: Path, tmp_path: Path) -> None:
    for on in (True, False):
        fixed = tiny_recipe(tiny_model, tmp_path, {"model": {"gradient_checkpointing": on}})
        assert choose_checkpointing(fixed, estimate_memory(fixed), (1, "a GPU")).on is on
    prefix = auto(tiny_model, tmp_path, adapter={"type": "prefix", "tokens": 2})
    assert not choose_checkpointing(prefix, estimate_memory(prefix), (1, "a GPU")).on
    unknown = auto(tiny_model, tmp_path, model={"path": "org/unknown", "gradient_checkpointing": "auto"})
    assert choose_checkpointing(unknown, estimate_memory(unknown), (GIB, "a GPU")).on
    shared = auto(tiny_model, tmp_path)
    memory = estimate_memory(shared)
    tight = (int((memory.device_bytes + 5_652_480) / 0.9) - 2, "a GPU")
    assert choose_checkpointing(shared, memory, tight).on
    assert choose_checkpointing(shared, memory, tight, Backend.DDP, 4).on


def test_a_run_decides_says_so_and_keeps_its_recipe(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for memory, on in ((GIB, False), (2**20, True)):
        monkeypatch.setattr("remix.training.build.device_memory", lambda _, size=memory: (size, "the host's memory"))
        recipe = auto(tiny_model, tmp_path / str(on), kl={"weight": 0.0})
        assert make_plan(recipe).checkpointing.on is False  # of this machine's memory
        told = list[str]()
        progress = Progress("test", recipe.run_dir, recipe.last_step, enabled=False)
        monkeypatch.setattr(progress, "message", told.append)
        with Cluster() as cluster, open_trainer(recipe, cluster, progress, resume=False) as trainer:
            assert trainer.policy.module.lm.is_gradient_checkpointing is on
            assert trainer.recipe.model.gradient_checkpointing == "auto"
        (words,) = (line for line in told if "gradient checkpointing" in line)
        assert words.startswith(f"gradient checkpointing {'on' if on else 'off'}: ")
        assert "gradient_checkpointing: auto" in (Path(recipe.run_dir) / "recipe.yaml").read_text(encoding="utf-8")


def test_sleep_is_refused_without_a_gpu(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_model, tmp_path / "run", {"rollout": {"engine": {"type": "vllm", "sleep": True}}})
    with pytest.raises(ValueError, match=r"rollout\.engine\.sleep: .* set it to false"), opened(recipe):
        pass
    assert not (tmp_path / "run").exists()
