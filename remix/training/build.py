"""From a recipe to a trainer with all its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from remix import checkpoint
from remix.config import HFEngineConfig, Recipe, VLLMServerConfig, dump_recipe
from remix.durable import locked, write_text
from remix.evaluation.exam import Exam
from remix.merging.continual import Alignment, saved_snapshot
from remix.models import files
from remix.models.adapters import adapter_config, trained_share
from remix.models.loading import load_actor_critic, load_processor, load_tokenizer, sees_images
from remix.models.policy import Policy
from remix.models.vision import Vision, check_vllm
from remix.replay import ReplayBuffer, remove_shards
from remix.rewards import RewardSuite
from remix.rollout.demonstrate import Demonstrations
from remix.rollout.sample import Sampler
from remix.tasks import PromptStream, TaskSet, encode, load_tasks
from remix.tracking.progress import Progress
from remix.tracking.run_log import RunLog, read_metrics
from remix.training.activations import choose_checkpointing, device_memory
from remix.training.distributed import Cluster
from remix.training.exams import build_exams
from remix.training.experience import Experience
from remix.training.interruption import Interruption
from remix.training.loop import Trainer
from remix.training.memory import estimate_memory
from remix.training.objective import Objective
from remix.training.packable import start_packing
from remix.training.plan import make_plan
from remix.training.probe import SyncProbe, check_images
from remix.training.servers import open_servers, refuse_servers
from remix.training.shards import Shards
from remix.training.state import TrainState, check_same_run, from_checkpoint, moved_on, run_identity
from remix.training.update import Updater
from remix.types import Engine, Prompt

if TYPE_CHECKING:
    from remix.rollout.hf import HFEngine


@contextmanager
def open_trainer(
    recipe: Recipe,
    cluster: Cluster,
    progress: Progress,
    *,
    resume: bool,
    allow_changed: bool = False,
    interruption: Interruption | None = None,
) -> Iterator[Trainer]:
    """A trainer ready to `fit`, from the newest whole checkpoint where there is one to resume from.

    `allow_changed`: go on although the recipe is not the one that the run was begun with. Closes what it opened.
    Raises ValueError for whatever the recipe asks that cannot be had.
    """
    run_dir = Path(recipe.run_dir)
    cluster.check_alike("the recipe", dump_recipe(recipe))
    checkpoint.seed_generators(recipe.seed)  # a fresh adapter and dropout; all else is named by (seed, step)
    policy, train, held_out = _load(recipe, cluster, progress)
    identity = run_identity(policy, train) | _global_adapter(recipe)
    policy.device = cluster.device
    updater = Updater(recipe, policy, Objective(recipe), cluster)
    replay = ReplayBuffer(max(phase.window for phase in recipe.phases))
    alignment = _build_alignment(recipe, policy, updater)  # before a checkpoint makes the policy what it became
    with ExitStack() as stack:
        _take_hold(run_dir, cluster, stack)
        saved = checkpoint.load_newest(run_dir, progress.message) if resume else None
        if saved is not None:
            changes = check_same_run(saved, recipe, identity, allow_changed=allow_changed)
            state = from_checkpoint(saved, policy, updater, replay, run_dir, rank=cluster.rank)
            _tell_resumed(state, changes, moved_on(saved, cluster.world_size), progress)
        else:
            state = _from_the_beginning(recipe, policy, progress, resume=resume)
        cluster.check_alike("the step that the run goes on from", state.step)
        rewards = stack.enter_context(RewardSuite(recipe.rewards))
        exams = build_exams(recipe, policy, held_out, rewards, stack)
        engine = build_engine(recipe, policy, train, exams, cluster, progress.message)
        stack.callback(cluster.forget)  # or a run after this one in the process would find its model beside its own
        stack.callback(engine.close)
        log = _open_log(recipe, state, enabled=cluster.is_main)
        _start_trackers(recipe, policy, cluster, stack)
        yield Trainer(
            recipe=recipe,
            run_dir=run_dir,
            cluster=cluster,
            policy=policy,
            sampler=_build_sampler(recipe, engine, rewards, policy, train, progress.message),
            probe=SyncProbe(recipe, policy, lambda value: cluster.any(value, "the probe of the engine")),
            stream=PromptStream(train, seed=recipe.seed),
            exams=exams,
            experience=Experience(recipe, policy, cluster),
            updater=updater,
            replay=replay,
            shards=Shards(run_dir, cluster, {} if saved is None else saved.state[checkpoint.FILES]),
            log=log,
            progress=progress,
            state=state,
            identity=identity,
            alignment=alignment,
            interruption=interruption or Interruption(),
        )


def _load(recipe: Recipe, cluster: Cluster, progress: Progress) -> tuple[Policy, list[TaskSet], list[TaskSet]]:
    """The policy as the run begins, its training prompts, encoded, and the held-out ones as they are.

    Where parameters are shared out, they are in main memory still: a device need not have room for them all.
    """
    device = torch.device("cpu") if cluster.backend.shares_out else cluster.device
    _refuse_sleep(recipe, cluster.device)
    if cluster.backend.shares_out and sees_images(recipe.model):
        raise ValueError(
            f"model.path {recipe.model.path}: {cluster.backend.value} does not share out a vision-language model; "
            "choose another backend (recipes/accelerate/zero2.yaml, multi_node.yaml)"
        )
    train = load_tasks(recipe.tasks, "train")
    asked = () if recipe.eval.benchmarks else recipe.eval.tasks or recipe.tasks
    held_out = load_tasks(asked, "test") if asked else []
    if recipe.rollout.engine.type != "hf" and sees_images(recipe.model):
        refuse_servers(recipe)
        check_vllm(recipe.model.path)
    processor = load_processor(recipe.model, needed=any(prompt.images for prompt in _prompts([train, held_out])))
    tokenizer = load_tokenizer(recipe.model, processor)
    train = _encoded(train, recipe, tokenizer, processor)
    for task in train:
        if task.excluded:
            progress.message(f"{task.name}: {task.excluded} problems left out, which `exclude` holds too")
    module = load_actor_critic(_checkpointing_decided(recipe, cluster, progress), tokenizer, device)
    progress.message(f"trains {trained_share(module.lm)}")
    vision = None if processor is None else Vision(processor, module.lm)
    policy = Policy(module, tokenizer, device=device, temperature=recipe.rollout.temperature, vision=vision)
    seen = next((prompt for prompt in _prompts([train]) if prompt.images), None)
    if seen is not None:
        check_images(recipe, policy, _hf_engine(policy, batch_size=1), seen)
    if recipe.batch.pack:
        tried, budget = [*_prompts([train])], recipe.batch.tokens_per_microbatch
        longest = recipe.prompt.max_tokens + recipe.rollout.max_tokens
        told = progress.message
        refused = start_packing(policy, tried, tokens_per_microbatch=budget, longest=longest, message=told)
        if refused is not None:
            progress.message(f"sequences are padded, not packed: {refused}")
    return policy, train, held_out


def _checkpointing_decided(recipe: Recipe, cluster: Cluster, progress: Progress) -> Recipe:
    """The same recipe, its `auto` decided by what the device has room for."""
    if recipe.model.gradient_checkpointing != "auto":
        return recipe
    device, world = device_memory(cluster.device), cluster.world_size
    chosen = choose_checkpointing(recipe, estimate_memory(recipe), device, cluster.backend, world)
    progress.message(f"gradient checkpointing {'on' if chosen.on else 'off'}: {chosen.why}")
    model = recipe.model.model_copy(update={"gradient_checkpointing": chosen.on})
    return recipe.model_copy(update={"model": model})


def _refuse_sleep(recipe: Recipe, device: torch.device) -> None:
    if getattr(recipe.rollout.engine, "sleep", False) and device.type != "cuda":
        raise ValueError(
            "rollout.engine.sleep: vLLM gives back the memory of a GPU alone, and this process has none: set it to "
            "false"
        )


def _from_the_beginning(recipe: Recipe, policy: Policy, progress: Progress, *, resume: bool) -> TrainState:
    if resume:
        progress.message(f"{recipe.run_dir} holds no checkpoint yet: from the beginning")
    policy.reference = policy.snapshot() if recipe.kl.weight else None
    return TrainState()


def _tell_resumed(state: TrainState, changes: Sequence[str], moved: Sequence[str], progress: Progress) -> None:
    """Where the run goes on, and by what it is no longer exactly the one that was begun."""
    state.changes += [f"step {state.step}: {change}" for change in changes]
    progress.step, progress.base_pass_at_1 = state.step, state.base_pass_at_1
    for change in [*changes, *moved]:
        progress.message(f"resumed at step {state.step}, no longer exactly the run it was: {change}")


def _take_hold(run_dir: Path, cluster: Cluster, stack: ExitStack) -> None:
    """No other process trains there until `stack` is closed; all ranks wait for that."""
    if cluster.is_main:
        stack.callback(lock_run(run_dir).close)
        checkpoint.recover(run_dir)
    cluster.barrier("the run directory")


def lock_run(run_dir: Path) -> IO[str]:
    """Raises ValueError where another process is at this run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = locked(run_dir / ".lock")
    if lock is None:
        raise ValueError(
            f"run_dir {run_dir}: another process is training there; end it first, or choose another run_dir"
        )
    return lock


def _open_log(recipe: Recipe, state: TrainState, *, enabled: bool) -> RunLog:
    """Whatever lies beyond the step that the run goes on from is taken away; it will come again."""
    run_dir = Path(recipe.run_dir)
    if enabled:
        checkpoint.set_aside(run_dir, beyond=state.step)
        checkpoint.settle(run_dir, keep=recipe.checkpoint.keep, best_step=state.best_step)
        remove_shards(run_dir, from_step=state.step)
    log = RunLog(run_dir, from_step=state.step, unlogged=state.unlogged is not None, enabled=enabled)
    if enabled:
        write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
    return log


def _start_trackers(recipe: Recipe, policy: Policy, cluster: Cluster, stack: ExitStack) -> None:
    """They are told the recipe, how much of the model it trains, and what the run has logged so far."""
    stack.callback(cluster.stop_trackers)
    share = trained_share(policy.module.lm)
    plain = recipe.model_dump(mode="json") | {"trained_parameters": share.trained, "trained_share": share.share}
    run_dir = Path(recipe.run_dir)
    cluster.start_trackers(run_dir, plain, read_metrics(run_dir) if cluster.is_main else [])


def _encoded(tasks: Sequence[TaskSet], recipe: Recipe, tokenizer: Any, processor: Any) -> list[TaskSet]:
    return [replace(task, prompts=tuple(encode(task.prompts, tokenizer, recipe.prompt, processor))) for task in tasks]


def _prompts(splits: Iterable[Sequence[TaskSet]]) -> Iterator[Prompt]:
    return (prompt for tasks in splits for task in tasks for prompt in task.prompts)


def _hf_engine(policy: Policy, batch_size: int) -> HFEngine:
    from remix.rollout.hf import HFEngine

    return HFEngine(
        policy.sampled_lm,
        eos_token_ids=policy.module.eos_token_ids,
        batch_size=batch_size,
        device=policy.device,
        autocast=lambda: policy.module.autocast(policy.device),
        never=policy.module.never,
        vision=policy.vision,
    )


def build_engine(
    recipe: Recipe,
    policy: Policy,
    train: Sequence[TaskSet],
    exams: Sequence[Exam],
    cluster: Cluster,
    message: Callable[[str], None],
) -> Engine:
    """What samples: transformers on the trainer's own module, or vLLM with a copy of the weights.

    `message` is told when an engine in its own process is started again.
    """
    config = recipe.rollout.engine
    if isinstance(config, HFEngineConfig):
        return _hf_engine(policy, config.batch_size)
    longest = max(recipe.prompt.max_tokens + recipe.rollout.max_tokens, *(exam.longest_sequence for exam in exams))
    if isinstance(config, VLLMServerConfig):
        return open_servers(recipe, config, policy, longest, cluster, message)
    prompts = [*_prompts([train]), *(prompt for exam in exams for prompt in exam.prompts)]
    arguments: dict[str, Any] = {
        "revision": recipe.model.revision,
        "dtype": recipe.model.dtype,
        "trust_remote_code": recipe.model.trust_remote_code,
        "max_model_len": longest,
        "eos_token_ids": policy.module.eos_token_ids,
        "memory_fraction": config.memory_fraction,
        "kv_cache_gib": config.kv_cache_gib,
        "enforce_eager": config.enforce_eager,
        "sleep": config.sleep,
        "seed": recipe.seed,
        "images": max(len(prompt.images) for prompt in prompts),
        "never": policy.module.never,
    }
    if config.lora == "hot_swap":
        arguments["lora"] = adapter_config(policy.module.lm)
    if config.own_process:
        from remix.rollout.process import EngineProcess

        return EngineProcess(
            recipe.model.path,
            weights=None if recipe.rollout.overlap else lambda: policy.engine_weights(config),
            message=message,
            device=policy.device,
            timeout=config.timeout,
            max_restarts=config.restarts,
            **arguments,
        )
    from remix.rollout.vllm import VLLMEngine

    return VLLMEngine(recipe.model.path, **arguments)


def _global_adapter(recipe: Recipe) -> dict[str, str]:
    """The hash of what an alignment is with: unlike other runs', these read it again when they are resumed."""
    path = getattr(recipe.adapter, "path", None)
    if recipe.alignment is None or path is None:
        return {}
    return {"adapter of adapter.path": files.fingerprint(Path(path), files.ADAPTER_FILES)["sha256"]}


def _build_alignment(recipe: Recipe, policy: Policy, updater: Updater) -> Alignment | None:
    config = recipe.alignment
    if config is None:
        return None
    initial = None if config.initial is None else saved_snapshot(policy, Path(config.initial))
    return Alignment(config, policy, updater, updates=make_plan(recipe).optimizer_steps.high, initial=initial)


def _build_sampler(
    recipe: Recipe,
    engine: Engine,
    rewards: RewardSuite,
    policy: Policy,
    train: Sequence[TaskSet],
    message: Callable[[str], None],
) -> Sampler:
    tokenizer = policy.tokenizer
    if not recipe.imitates:
        return Sampler(engine, rewards, _decoder(tokenizer), recipe.seed)

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ends = policy.module.eos_token_ids
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    sampler = Demonstrations(engine, rewards, _decoder(tokenizer), recipe.seed, encode=encoded, eos_token_id=eos)
    told = sampler.cut(_prompts([train]), recipe.rollout.max_tokens)
    if told is not None:
        message(told)
    return sampler


def _decoder(tokenizer: Any) -> Any:
    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return decode
