"""What a run is evaluated on: benchmarks, or the held-out prompts of its own tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from remix.config import Recipe
from remix.evaluation.benchmarks import load_benchmarks, load_problems
from remix.evaluation.build import benchmark_exam, check_context, held_out_exam
from remix.evaluation.exam import Exam
from remix.evaluation.overrides import recipe_overrides
from remix.models.loading import context_length
from remix.models.policy import Policy
from remix.rewards import GraderPool
from remix.rollout.sample import Scorer
from remix.tasks import TaskSet, encode, eval_prompts
from remix.types import Prompt, Sampling

GRADER_WORKERS = 4


def build_exams(
    recipe: Recipe, policy: Policy, held_out: Sequence[TaskSet], rewards: Scorer, stack: ExitStack
) -> list[Exam]:
    """The exams, encoded; `held_out` is not. What they keep open is closed by `stack`. Raises ValueError."""
    config, overrides = recipe.eval, recipe_overrides(recipe)
    if config.benchmarks:
        grader = stack.enter_context(GraderPool(workers=min(GRADER_WORKERS, os.cpu_count() or 1)))
        data_dir = None if config.data_dir is None else Path(config.data_dir)
        exams = [
            benchmark_exam(
                benchmark,
                load_problems(benchmark, data_dir),
                policy.tokenizer,
                grader,
                overrides,
                chat=recipe.prompt.chat,
                processor=None if policy.vision is None else policy.vision.processor,
            )
            for benchmark in load_benchmarks(config.benchmarks)
        ]
    else:
        sampling = Sampling(
            config.max_tokens or recipe.rollout.max_tokens,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=config.top_p or 1.0,
        )
        by_name = {task.name: [task] for task in held_out} if config.tasks else {"": held_out}

        def chosen(sets: Sequence[TaskSet]) -> list[Prompt]:
            """Chosen first: encoding pictures is work."""
            processor = None if policy.vision is None else policy.vision.processor
            asked = eval_prompts(sets, config.prompts, seed=0)
            return encode(asked, policy.tokenizer, recipe.prompt, processor)

        exams = [
            held_out_exam(
                chosen(sets),
                rewards,
                name=name,
                samples=config.samples or 1,
                sampling=sampling,
                reflection_phrases=recipe.log.reflection_patterns,
            )
            for name, sets in by_name.items()
        ]
    check_context(exams, context_length(recipe.model), "eval.max_tokens")
    return exams
