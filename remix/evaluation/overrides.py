"""What is asked of benchmarks instead of what their definitions say. Light: `remix plan` counts with it."""

from __future__ import annotations

from dataclasses import dataclass

from remix.config import Recipe
from remix.evaluation.benchmarks import Benchmark, load_benchmarks
from remix.types import Sampling


@dataclass(frozen=True, slots=True)
class Overrides:
    """None = as defined."""

    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    limit: int | None = None
    """Only the first so many problems of each."""

    def sampling(self, benchmark: Benchmark) -> Sampling:
        temperature = benchmark.temperature if self.temperature is None else self.temperature
        return Sampling(
            max_tokens=self.max_tokens or benchmark.max_tokens,
            temperature=temperature,
            top_p=1.0 if temperature == 0 else self.top_p or benchmark.top_p,
        )

    def samples_of(self, benchmark: Benchmark) -> int:
        """Responses to each problem. Greedy ones would all be the same, so without a word it is one."""
        greedy = self.sampling(benchmark).temperature == 0
        if greedy and (self.samples or 1) > 1:
            raise ValueError(
                f"{benchmark.name}: at temperature 0 all {self.samples} samples are the same; raise the temperature, "
                "or set samples to 1"
            )
        return self.samples or (1 if greedy else benchmark.samples)


def recipe_overrides(recipe: Recipe) -> Overrides:
    """Of evaluations during training."""
    config = recipe.eval
    return Overrides(
        samples=config.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens or recipe.rollout.max_tokens,
        limit=config.limit,
    )


def evaluation_responses(recipe: Recipe) -> int:
    """Responses of one evaluation during training, from definitions alone. Raises ValueError on an unknown name."""
    if not recipe.eval.benchmarks:
        return recipe.eval.prompts * (recipe.eval.samples or 1) * max(len(recipe.eval.tasks), 1)
    overrides = recipe_overrides(recipe)
    return sum(
        min(benchmark.count, recipe.eval.limit or benchmark.count) * overrides.samples_of(benchmark)
        for benchmark in load_benchmarks(recipe.eval.benchmarks)
    )
