"""Tasks one after the other: a run of its own for each, its adapter merged, and all tasks evaluated after it.

Every stage is an ordinary run of an ordinary recipe in `RUN_DIR/stages/`, so it resumes as any run does. What belongs
to the whole stands in `RUN_DIR/continual.json`, which is written anew after every task; a task that is in it is done.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from remix import checkpoint
from remix.config import (
    IndependentMethod,
    MergingBlock,
    PAMMethod,
    PAMTallMethod,
    Recipe,
    TiesMethod,
    changed_keys,
    dump_recipe,
    parse_recipe,
)
from remix.durable import folder_written_whole, write_json, write_text
from remix.evaluation.continual import RECORD, Learnt, Record, read_record
from remix.evaluation.continual_report import markdown
from remix.evaluation.transfer import summary
from remix.merging.continual import (
    average_into,
    masked_for_task,
    merge_adapters,
    saved_snapshot,
    sign_conflict,
)
from remix.models.adapters import save_model
from remix.models.loading import load_actor_critic, load_processor, load_tokenizer
from remix.models.policy import Policy, Snapshot
from remix.tasks import Split, encode, eval_prompts, load_tasks
from remix.tracking.progress import Progress
from remix.training.build import lock_run, open_trainer
from remix.training.distributed import Cluster
from remix.training.finish import finish
from remix.training.interruption import Interruption
from remix.training.loop import Trainer
from remix.training.stages import stage_dir, stage_recipe, task_order

SIGN_SHARE = 0.5
"""Of the entries, in the sign conflict that is recorded: the paper's p."""


def run_continual(
    recipe: Recipe, recipe_path: str, cluster: Cluster, *, resume: bool, allow_changed: bool, interruption: Interruption
) -> tuple[Record, dict[str, Any]]:
    """Learns the tasks that remain, in order, and writes final/ and result.json. Raises what `remix.train.run` does."""
    order = task_order(recipe)
    run_dir = Path(recipe.run_dir)
    with ExitStack() as stack:
        if cluster.is_main:
            stack.callback(lock_run(run_dir).close)
        record = _open_record(recipe, order, cluster, resume=resume, allow_changed=allow_changed)
        options: dict[str, Any] = {"allow_changed": allow_changed, "interruption": interruption}
        for index in range(len(record.learnt), len(order)):
            record.learnt.append(_learn(recipe, record, index, recipe_path, cluster, **options))
            if cluster.is_main:
                merged = stage_dir(run_dir, index) / "merged"
                if merged.exists():  # first: what the record names is finished
                    _write_card(recipe, record, merged)
                record.write(run_dir)
        result = _result(recipe, record)
        if cluster.is_main:
            _conclude(recipe, record, result)
    return record, result


def _learn(recipe: Recipe, record: Record, index: int, recipe_path: str, cluster: Cluster, **options: Any) -> Learnt:
    """One task: its run, and what is made of its adapter. A function, so that its model is gone before the next."""
    stage, task = stage_recipe(recipe, record.order, index), record.order[index]
    title = f"{task} ({index + 1} of {len(record.order)})"
    progress = Progress(title, stage.run_dir, stage.last_step, enabled=cluster.is_main)
    begun = (Path(stage.run_dir) / "recipe.yaml").exists()
    with progress, open_trainer(stage, cluster, progress, resume=begun, **options) as trainer:
        trainer.fit()
        finish(trainer, recipe_path)
        return _after_task(recipe, record, trainer, Path(recipe.run_dir))


def _open_record(recipe: Recipe, order: list[str], cluster: Cluster, *, resume: bool, allow_changed: bool) -> Record:
    """Of the run so far, or a new one with the adapter that no task has trained."""
    assert recipe.continual is not None
    run_dir = Path(recipe.run_dir)
    # As the first rank sees it: another might come when the record is already being written.
    if cluster.gather(resume and (run_dir / RECORD).exists(), "the record of the tasks")[0]:
        saved = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        changes = changed_keys(parse_recipe(saved, "the run's recipe"), recipe)
        fixed = [change for change in changes if change.startswith(("continual.", "tasks."))]
        if fixed or (changes and not allow_changed):
            raise ValueError(
                f"the recipe is not the one that the run was begun with: {'; '.join(fixed or changes)}. Put them back"
                + (", or begin a new run" if fixed else ", or add --allow-changed to go on all the same")
            )
        return read_record(run_dir)
    processor, tokenizer = _check_data(recipe, order)
    record = Record(recipe.continual.method.model_dump(mode="json"), order)
    if cluster.is_main:
        checkpoint.seed_generators(recipe.seed)
        module = load_actor_critic(recipe, tokenizer, torch.device("cpu"))
        with folder_written_whole(run_dir / "initial") as folder:
            save_model(module.lm, processor or tokenizer, folder, base_changed=False)
        write_text(run_dir / "recipe.yaml", dump_recipe(recipe))
        record.write(run_dir)
    cluster.barrier("the untrained adapter")
    return record


def _check_data(recipe: Recipe, order: Sequence[str]) -> tuple[Any, Any]:
    """Reads what all the tasks will read, pictures too, so that nothing is found missing hours later.

    Returns processor and tokenizer. Raises ValueError.
    """
    splits: tuple[Split, Split] = ("train", "test")
    train, held_out = (load_tasks(recipe.tasks, split) for split in splits)
    left_out = [name for name in order if name not in {task.name for task in held_out}]
    if left_out:
        raise ValueError(
            f"task '{left_out[0]}' has no held-out problems, by which forgetting is measured: give it a holdout above "
            "0, or an evaluation split"
        )
    chosen = [eval_prompts([task], recipe.eval.prompts, seed=0) for task in held_out]
    prompts = [prompt for found in (*(task.prompts for task in train), *chosen) for prompt in found]
    processor = load_processor(recipe.model, needed=any(prompt.images for prompt in prompts))
    tokenizer = load_tokenizer(recipe.model, processor)
    encode(prompts, tokenizer, recipe.prompt, processor)
    return processor, tokenizer


def _result(recipe: Recipe, record: Record) -> dict[str, Any]:
    return {
        "run_dir": recipe.run_dir,
        "seed": recipe.seed,
        "tasks": len(record.order),
        **summary(record.matrix),
        "rollouts": sum(row.rollouts for row in record.learnt),
        "seconds": round(sum(row.seconds for row in record.learnt), 3),
    }


def _conclude(recipe: Recipe, record: Record, result: Mapping[str, Any]) -> None:
    """result.json, and the adapter that the run ends with in final/, where all tasks share one."""
    assert recipe.continual is not None
    run_dir, last = Path(recipe.run_dir), stage_dir(Path(recipe.run_dir), len(record.order) - 1)
    if not isinstance(recipe.continual.method, IndependentMethod):
        kept = last / "merged"
        with folder_written_whole(run_dir / "final") as folder:
            shutil.copytree(kept if kept.exists() else last / "final", folder, dirs_exist_ok=True)
            _write_card(recipe, record, folder)
    write_json(run_dir / "result.json", result)


def _write_card(recipe: Recipe, record: Record, folder: Path) -> None:
    """The README of an adapter that all tasks so far share."""
    metadata = {"base_model": recipe.model.path, "library_name": "peft", "tags": ["remix", "continual-learning"]}
    head = yaml.safe_dump(metadata, sort_keys=False).strip()
    write_text(folder / "README.md", f"---\n{head}\n---\n\n{markdown(record)}")


# --- after a task -------------------------------------------------------------------------------------------------


def _after_task(recipe: Recipe, record: Record, trainer: Trainer, run_dir: Path) -> Learnt:
    """Merges the adapter that was just trained into what is kept, and evaluates that on all tasks."""
    assert recipe.continual is not None
    began, method, index = time.perf_counter(), recipe.continual.method, len(record.learnt)
    if index == 0:
        record.base = accuracies(trainer.state.base_evaluation or {}, record.order)
    own = accuracies(trainer.state.evaluation or {}, record.order)
    merged, conflict = dict(own), None
    adapters = Adapters(trainer.policy, run_dir)
    if isinstance(method, PAMMethod) and index:
        conflict = sign_conflict(adapters.of_task(index), adapters.merged(index - 1), SIGN_SHARE)
    kept = _merge(recipe, adapters, index)
    if kept is not None:
        _save(trainer, kept, stage_dir(run_dir, index) / "merged")
        merged = accuracies(trainer.evaluate(), record.order)
    if isinstance(method, IndependentMethod):
        merged |= {row.task: row.own[row.task] for row in record.learnt}
    if isinstance(method, PAMTallMethod):
        assert kept is not None
        for number, task in enumerate(record.order[: index + 1]):
            trainer.policy.load(masked_for_task(kept, adapters.initial, adapters.of_task(number), method.threshold))
            merged |= accuracies(trainer.evaluate([task]), [task])
    seconds = trainer.state.seconds + time.perf_counter() - began
    return Learnt(record.order[index], own, merged, conflict, trainer.state.rollouts, round(seconds, 3))


def _merge(recipe: Recipe, adapters: Adapters, index: int) -> Snapshot | None:
    """What the run keeps after task `index`; None where that is the adapter as it was trained."""
    assert recipe.continual is not None
    method = recipe.continual.method
    if isinstance(method, PAMMethod):
        w = adapters.of_task(index)
        weight = 0.5 if method.average == "half" else 1.0 / (index + 1)
        return average_into(adapters.merged(index - 1), w, weight) if index else w
    if not isinstance(method, MergingBlock):
        return None
    tasks = [adapters.of_task(number) for number in range(index + 1)]
    weight = method.weight or (1.0 / len(tasks) if method.type == "average" else 1.0)
    parameters = {"density": method.density} if isinstance(method, TiesMethod) else {}
    name = "task_arithmetic" if method.type == "average" else method.type
    products = method.form == "delta"
    return merge_adapters(name, adapters.initial, tasks, [weight] * len(tasks), products=products, **parameters)


class Adapters:
    """The saved adapters of a run as snapshots of its policy."""

    def __init__(self, policy: Policy, run_dir: Path) -> None:
        self._policy, self._run_dir = policy, run_dir

    @property
    def initial(self) -> Snapshot:
        return saved_snapshot(self._policy, self._run_dir / "initial")

    def of_task(self, index: int) -> Snapshot:
        return saved_snapshot(self._policy, stage_dir(self._run_dir, index) / "final")

    def merged(self, index: int) -> Snapshot:
        return saved_snapshot(self._policy, stage_dir(self._run_dir, index) / "merged")


def _save(trainer: Trainer, kept: Snapshot, folder: Path) -> None:
    """Makes it the policy, and writes it down."""
    trainer.policy.load(kept)
    if trainer.cluster.is_main:
        with folder_written_whole(folder) as files:
            save_model(trainer.policy.module.lm, trainer.policy.reader, files, base_changed=False)
    trainer.cluster.barrier("the merged adapter")


def accuracies(metrics: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """pass@1 by task, of an evaluation's metrics."""
    return {task: metrics[f"eval/{task}/pass@1"] for task in tasks}
