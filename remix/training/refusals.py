"""What is refused before a model is loaded: contradictions that need the model's shape or the number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from remix.config import (
    ArithmeticTask,
    IA3Adapter,
    LayersAdapter,
    LoraAdapter,
    MfeEtpTask,
    PrefixAdapter,
    PromptAdapter,
    Recipe,
    SeparateCritic,
    ShapesTask,
    VLLMEngineConfig,
    VLLMServerConfig,
    nearest,
)
from remix.models.adapter_files import check_start
from remix.models.files import check_weights
from remix.training.model_shape import ModelShape, find_shape, is_target
from remix.training.schedule import phase_bounds

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def refuse_contradictions(recipe: Recipe, world_size: int) -> None:
    """Raises ValueError, one line a problem, each naming its key and the remedy."""
    problems = [*_models(recipe), *_start(recipe), *_batch(recipe, world_size), *_data(recipe), *_phases(recipe)]
    shape = None if problems else find_shape(recipe.model)
    if shape is not None:
        problems += [*_lengths(recipe, shape), *_adapter(recipe, shape), *_images(recipe, shape)]
    if problems:
        raise ValueError("\n".join(problems))


def check_model_directory(path: str | Path) -> None:
    """Raises ValueError where a directory lacks what `from_pretrained` will ask for."""
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, False for what is too long for a path
        raise ValueError(f"{path}: no such directory; name a model's directory or a hub id")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(f"{path}: holds an adapter, not a model: merge it into its base first")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no config.json, so this is no model: name the directory that holds it")
    check_weights(path)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"{path}: no tokenizer ({', '.join(TOKENIZERS)}): save the model's tokenizer beside it")


def is_local(path: str) -> bool:
    """A directory, or what can only be meant as one; anything else is a hub id."""
    return os.path.isdir(path) or path.startswith(("/", "./", "../", "~")) or path.count("/") > 1


def _models(recipe: Recipe) -> Iterator[str]:
    paths = {"model.path": recipe.model.path}
    if isinstance(recipe.critic, SeparateCritic) and recipe.critic.path:
        paths["advantage.critic.path"] = recipe.critic.path
    for key, path in paths.items():
        if is_local(path):
            try:
                check_model_directory(path)
            except ValueError as error:
                yield f"{key}: {error}"


def _start(recipe: Recipe) -> Iterator[str]:
    try:
        check_start(recipe.adapter, recipe.model.path)
    except ValueError as error:
        yield str(error)


def _batch(recipe: Recipe, world_size: int) -> Iterator[str]:
    batch, responses = recipe.batch, recipe.batch.prompts * recipe.rollout.group_size
    if responses // batch.minibatches < world_size:
        yield (
            f"batch.minibatches {batch.minibatches} leaves {responses // batch.minibatches} of {responses} responses "
            f"to a minibatch, fewer than the {world_size} processes: set it to {responses // world_size} or less"
            if responses >= world_size
            else f"batch.prompts x rollout.group_size is {responses} responses for {world_size} processes: "
            "raise batch.prompts, or launch fewer processes"
        )
    engine = recipe.rollout.engine
    apart = isinstance(engine, VLLMServerConfig) or (isinstance(engine, VLLMEngineConfig) and engine.own_process)
    if apart and world_size > 1 and getattr(engine, "timeout", 0.0) >= recipe.faults.rank_timeout:
        yield (
            f"rollout.engine.timeout is not below faults.rank_timeout ({recipe.faults.rank_timeout:g} s): before an "
            "engine that hangs were given up, the other processes would have been. Lower the one or raise "
            "the other"
        )
    longest = recipe.prompt.max_tokens + recipe.rollout.max_tokens
    if batch.tokens_per_microbatch < longest:
        yield (
            f"batch.tokens_per_microbatch {batch.tokens_per_microbatch} cannot hold one longest sequence of {longest} "
            f"(prompt.max_tokens + rollout.max_tokens): set it to {longest} or more, or lower either"
        )


def _data(recipe: Recipe) -> Iterator[str]:
    """A generated task has `size` problems, any other at most `limit`, if it has one and it is set."""
    generated = ArithmeticTask | ShapesTask
    sizes = [t.size if isinstance(t, generated) else getattr(t, "limit", None) for t in recipe.tasks]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes) and sum(known) < recipe.batch.prompts:
        yield (
            f"batch.prompts {recipe.batch.prompts} exceeds the {sum(known)} training problems of the tasks: "
            f"lower it, or raise their size or limit"
        )


def _phases(recipe: Recipe) -> Iterator[str]:
    earliest = accumulate(phase_bounds(recipe, phase, first=index == 0)[0] for index, phase in enumerate(recipe.phases))
    for index, start in enumerate(earliest, start=1):
        if index < len(recipe.phases) and start >= recipe.steps:
            yield (
                f"phases.{index} never starts: phases.{index - 1} ends after step {start} at the earliest and the run "
                f"at steps {recipe.steps}: lower phases.{index - 1}.until, or raise steps"
            )
            return
    if recipe.optimizer.warmup_steps >= recipe.steps:
        yield (
            f"optimizer.warmup_steps {recipe.optimizer.warmup_steps} lasts the whole run of steps {recipe.steps}, "
            "so the learning rate is never reached: lower it"
        )


def _lengths(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    adapter = recipe.adapter
    ahead = adapter.tokens if isinstance(adapter, PrefixAdapter | PromptAdapter) else 0
    longest = recipe.prompt.max_tokens + recipe.rollout.max_tokens + ahead
    if shape.positions is not None and longest > shape.positions:
        virtual = f" + adapter.tokens {ahead}" if ahead else ""
        yield (
            f"prompt.max_tokens {recipe.prompt.max_tokens} + rollout.max_tokens {recipe.rollout.max_tokens}{virtual} "
            f"exceeds the model's {shape.positions} positions: lower either"
        )


def _images(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    for index, task in enumerate(recipe.tasks):
        if shape.images is False and (isinstance(task, ShapesTask | MfeEtpTask) or getattr(task, "images", None)):
            yield (
                f"tasks.{index} has images, and {recipe.model.path} is a text model: set model.path to a "
                "vision-language model, or leave the task out"
            )


def _adapter(recipe: Recipe, shape: ModelShape) -> Iterator[str]:
    adapter = recipe.adapter
    if isinstance(adapter, LayersAdapter) and shape.block is not None:
        if adapter.last_blocks > shape.blocks:
            yield f"adapter.last_blocks {adapter.last_blocks}: the model has {shape.blocks} blocks; lower it"
        if adapter.head and shape.tied:
            yield (
                "adapter.head: this model's output head is its embedding (tie_word_embeddings), which is not trained "
                "apart: set adapter.head to false, or adapter.type to none"
            )
    if not isinstance(adapter, LoraAdapter | IA3Adapter):
        return
    if isinstance(adapter, LoraAdapter) and adapter.rank > shape.hidden_size:
        yield (
            f"adapter.rank {adapter.rank} exceeds the model's hidden size {shape.hidden_size}, "
            "where it saves nothing: lower it, or set adapter.type to none"
        )
    if shape.linears is not None:
        targets = (adapter.targets,) if isinstance(adapter.targets, str) else adapter.targets
        names = {name.rpartition(".")[2] for name in shape.linears}
        for target in targets:
            chosen = target if isinstance(adapter.targets, str) else (target,)
            if not any(is_target(name, chosen) for name in shape.linears):
                yield f"adapter.targets: no matrix of the model is called '{target}'; {nearest(target, names)}"
