"""MFE-ETP's annotations (arXiv 2407.05047): embodied task planning, a folder per kind with data.json and images/.

    {"metadata": {"task_instruction": [text, ...], ...},
     "data": [{"task_instance": {"context", "images_path": [name, ...]}, "response", "task_instruction_id"}, ...]}

What is asked is the annotation's instruction and its context. Affordance and operation are answered by an action's
name, sequence by the letter of an option, spatial perception by a number or an order of images ("3,1,2"): compare them
by `exact_match` with `normalize: true`. The others are mostly answered in sentences, and planning has no response at
all: those take a judge, which is not part of this task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from remix.config import MfeEtpTask
from remix.config.block import nearest, quotable
from remix.tasks.annotations import images_in, member, read_json, rows_of, said
from remix.tasks.rows import Split, cut, is_empty
from remix.types import Prompt


def load_mfe_etp(config: MfeEtpTask, split: Split, task: str) -> list[Prompt]:
    """The questions of all `kinds`; a share of them, by their first image, is held out."""
    folder = Path(config.path)
    there = sorted(data.parent.name for data in folder.glob("*/data.json"))
    prompts: list[Prompt] = []
    for kind in config.kinds:
        if kind not in there:
            found = (
                nearest(kind, there) if there else "it holds no KIND/data.json at all: set `path` to the data folder"
            )
            raise ValueError(f"{folder} has no kind '{quotable(kind)}'; {quotable(found)}")
        prompts += _prompts(folder / kind, config, task)
    return cut(prompts[: config.limit], config.holdout, split)


def _prompts(folder: Path, config: MfeEtpTask, task: str) -> Iterator[Prompt]:
    path = folder / "data.json"
    value = read_json(path)
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: a {type(value).__name__}; it has to be an object with 'metadata' and 'data'")
    instructions = member(value, "metadata", dict, str(path)).get("task_instruction", [])
    for number, (where, row) in enumerate(rows_of(member(value, "data", list, str(path)), f"{path}: data")):
        if is_empty(row.get("response")):
            if config.unanswered == "drop":
                continue
            raise ValueError(
                f"{where}: no response, so no reward can check an answer; "
                f"leave '{folder.name}' out of `kinds`, or such annotations by `unanswered: drop`"
            )
        instance = member(row, "task_instance", dict, where)
        asked = said(instance, "context" if "context" in instance else "task_description", where)
        content = "\n".join([*_instruction(row, instructions, where), asked])
        images = images_in(folder / "images", member(instance, "images_path", list, where), where)
        yield Prompt(f"{task}/{folder.name}/{number}", content, said(row, "response", where), task, images=images)


def _instruction(row: Mapping[str, Any], instructions: Any, where: str) -> list[str]:
    """The instruction that the annotation goes by; none where its kind has none."""
    place = row.get("task_instruction_id")
    if place is None or not instructions:
        return []
    if not isinstance(instructions, list) or not isinstance(place, int) or not 0 <= place < len(instructions):
        raise ValueError(f"{where}: task_instruction_id {quotable(repr(place))} is none of metadata.task_instruction")
    return [str(instructions[place])]
