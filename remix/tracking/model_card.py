"""The README of a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from remix import __version__
from remix.config import Recipe
from remix.terminal import markdown_code, markdown_text


def model_card(recipe: Recipe, result: Mapping[str, Any]) -> str:
    """Markdown with the metadata that model hubs read: base model, recipe, seed, rollouts, scores."""
    adapter = recipe.adapter.type != "none"
    metadata = {
        "base_model": recipe.model.path,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", "remix", recipe.advantage.type],
    }
    phases = " → ".join(phase.type for phase in recipe.phases)
    tasks = ", ".join(task.type for task in recipe.tasks)
    before, after = _share(result["base_pass_at_1"]), _share(result["final_pass_at_1"])
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {markdown_text(recipe.model.path.rstrip("/").rsplit("/", 1)[-1])}, fine-tuned with ReMix

Reinforcement fine-tuning by ReMix {__version__} (arXiv 2507.06892): {recipe.advantage.type} advantages, {phases}.

| | |
|---|---|
| pass@1, before → after | {before} → {after} |
| evaluated on | {_evaluated_on(recipe)} |
| tasks | {tasks} |
| training steps | {result["steps"]} of {recipe.steps} |
| rollouts generated | {result["rollouts"]:,} |
| reincarnated before steps | {", ".join(map(str, result["reincarnations"])) or "never"} |
| seconds | {result["seconds"]:.0f} |
| recipe | {markdown_code(result["recipe"])} |
| seed | {recipe.seed} |

The resolved recipe is `recipe.yaml` of the run directory.
"""


def _evaluated_on(recipe: Recipe) -> str:
    config = recipe.eval
    asked = {
        "samples": config.samples,
        "temperature": config.temperature,
        "top-p": config.top_p,
        "max tokens": config.max_tokens or recipe.rollout.max_tokens,
    }
    settings = [f"{name} {value}" for name, value in asked.items() if value is not None]
    problems = markdown_text(", ".join(config.benchmarks)) or f"{config.prompts} held-out problems"
    return "; ".join([problems, *settings])


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f}%"
