"""What a run leaves at its end: the model in a standard format, its card, the result."""

from __future__ import annotations

from typing import Any

import torch

from remix.durable import folder_written_whole, write_json
from remix.models.adapters import save_model, trained_share
from remix.tracking.model_card import model_card
from remix.training.loop import Trainer


def finish(trainer: Trainer, recipe_path: str) -> dict[str, Any]:
    """Writes final/ and result.json, whose content it returns."""
    state, recipe = trainer.state, trainer.recipe
    share = trained_share(trainer.policy.module.lm)
    result = {
        "base_pass_at_1": state.base_pass_at_1,
        "final_pass_at_1": state.pass_at_1,
        "benchmarks": list(recipe.eval.benchmarks),
        "rollouts": state.rollouts,
        "steps": state.step,
        "seconds": round(state.seconds, 3),
        "recipe": recipe_path,
        "run_dir": str(trainer.run_dir),
        "seed": recipe.seed,
        "reincarnations": state.phase.reincarnations,
        "adapter": recipe.adapter.type,
        "trained_parameters": share.trained,
        "trained_share": share.share,
    }
    trainer.progress.stage("saving the model")
    with trainer.policy.whole_lm(torch.device("cpu")) as lm:
        if trainer.cluster.is_main:
            with folder_written_whole(trainer.run_dir / "final") as final:
                save_model(lm, trainer.policy.reader, final, base_changed=state.base_merged)
                (final / "README.md").write_text(model_card(recipe, result), encoding="utf-8")
            write_json(trainer.run_dir / "result.json", result)
    trainer.cluster.barrier("saving the model")
    return result
