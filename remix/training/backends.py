"""Which backend a run was launched under, what it cannot do, and what of its own it must leave to us."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from remix.config import Recipe


class Backend(Enum):
    """How processes share the work; the values are their names in messages."""

    DDP = "one process or DDP"
    FSDP2 = "FSDP2"
    ZERO2 = "DeepSpeed ZeRO-2"
    ZERO3 = "DeepSpeed ZeRO-3"

    @property
    def is_zero(self) -> bool:
        return self in (Backend.ZERO2, Backend.ZERO3)

    @property
    def shares_out(self) -> bool:
        """No process holds whole parameters."""
        return self in (Backend.FSDP2, Backend.ZERO3)

    @property
    def in_step(self) -> bool:
        """Every forward and backward of training needs all ranks."""
        return self is not Backend.DDP


def asked_for(environment: Mapping[str, str]) -> Backend:
    """What `accelerate launch` says in the environment. Raises ValueError."""
    if _is_on(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("launched under MEGATRON_LM, which is not supported: choose a file of recipes/accelerate/")
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION") != "2":
            raise ValueError(
                "launched under FSDP 1: set fsdp_config.fsdp_version to 2, see recipes/accelerate/fsdp2.yaml"
            )
        return Backend.FSDP2
    if not _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        return Backend.DDP
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise ValueError(
            "launched with a deepspeed_config_file, whose settings may contradict the recipe's: give "
            "deepspeed_config.zero_stage and the offload_* keys in the accelerate configuration in place of it, see "
            "recipes/accelerate/zero2.yaml"
        )
    if stage not in ("2", "3"):
        raise ValueError(
            f"launched under DeepSpeed with zero_stage {stage}: set deepspeed_config.zero_stage to 2 or 3, see "
            "recipes/accelerate/zero2.yaml"
        )
    return Backend.ZERO2 if stage == "2" else Backend.ZERO3


def check_launch(backend: Backend, environment: Mapping[str, str]) -> None:
    """Raises ValueError where the accelerate configuration asks for what this trainer decides itself or cannot do."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16":
        raise ValueError(
            "launched with mixed_precision fp16, which needs loss scaling: set it to 'no'; the "
            "recipe's model.dtype decides, bfloat16 among them"
        )
    if backend is not Backend.DDP and precision != "no":
        raise ValueError(f"launched with mixed_precision {precision}: set it to 'no'; the recipe's model.dtype decides")
    never = {
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading: each process loads the model itself",
        "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: recipes/accelerate/zero3_offload.yaml offloads",
        "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: the recipe has model.gradient_checkpointing",
    }
    for name, said in never.items() if backend is Backend.FSDP2 else ():
        if _is_on(environment, name):
            raise ValueError(f"fsdp_config.{said}; set it to false")
    if backend is Backend.FSDP2 and environment.get("FSDP_AUTO_WRAP_POLICY") != "TRANSFORMER_BASED_WRAP":
        raise ValueError(
            "fsdp_config.fsdp_auto_wrap_policy: set it to TRANSFORMER_BASED_WRAP, so that blocks are gathered singly"
        )
    nvme = [n for n in ("OPTIMIZER", "PARAM") if environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{n}_DEVICE") == "nvme"]
    if backend.is_zero and nvme:
        raise ValueError(
            f"deepspeed_config.offload_{nvme[0].lower()}_device nvme is not supported: set it to cpu or none"
        )


def prepare_zero(plugin: Any, backend: Backend) -> None:
    """DeepSpeed's settings that a recipe decides, or that would keep parameters gathered behind our back."""
    bin_folder = str(Path(sys.executable).parent)
    if shutil.which("ninja") is None and Path(bin_folder, "ninja").exists():
        os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    # transformers looks at it, and would load models and generate in ZeRO-3's way, each step together with all ranks.
    plugin.dschf = None
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    config = plugin.deepspeed_config
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    if backend is Backend.ZERO3:
        # Or small parameters, and those that will soon be used again, stay as they were while an anchor stands in.
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}


def check_recipe(recipe: Recipe, backend: Backend) -> None:
    """Raises ValueError, one line a problem, where the backend cannot do what the recipe asks."""
    problems = list(_problems(recipe, backend))
    if problems:
        raise ValueError("\n".join(problems))


def _problems(recipe: Recipe, backend: Backend) -> Iterator[str]:
    others = "one process or DDP can (recipes/accelerate/cpu_2proc.yaml, multi_node.yaml)"
    whole = f"ZeRO-2 (recipes/accelerate/zero2.yaml), {others}"
    name = backend.value
    if backend is Backend.DDP:
        return
    if recipe.continual is not None:
        yield f"continual: {name} cannot merge adapters while it trains; {others}"
    if recipe.alignment is not None:
        yield f"alignment: {name} cannot align the signs of weights that no process holds whole; {others}"
    if not backend.shares_out:
        return
    if recipe.kl.weight and recipe.kl.estimator == "full":
        yield (
            f"kl.estimator full: {name} cannot run the forward of an anchor amid an update; set it to k1, k2 or k3, or "
            f"choose another backend: {whole}"
        )
    if getattr(recipe.rollout.engine, "own_process", False):
        yield (
            f"rollout.engine.own_process: an engine that is started again asks one process for weights, which {name} "
            f"gives to none whole; set it to false, or choose another backend: {whole}"
        )
    if recipe.model.compile:
        yield (
            f"model.compile: {name} gathers weights by hooks within the blocks, which are not compiled; set it to "
            f"false, or choose another backend: {whole}"
        )
    if recipe.adapter.type not in ("none", "lora"):
        yield f"adapter.type {recipe.adapter.type}: {name} shares out full weights and lora alone; {whole}"


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")
