"""CoIN's annotations (arXiv 2403.08350): ScienceQA, TextVQA, ImageNet, GQA, VizWiz, Grounding, VQAv2, OCR-VQA.

    training   [{"id", "image", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                  {"from": "gpt", "value": "a cat"}, ...]}, ...]
    test       [{"question_id", "image", "text", "answer"}, ...]       Grounding has "answer_bbox" for "answer"

One JSON file each; images lie in a folder and are named relative to it. LLaVA's instruction files have the same form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from remix.config import CoinTask
from remix.tasks.annotations import member, read_json, rows_of, said
from remix.tasks.rows import Split, cut, image_in, is_empty
from remix.types import Message, Prompt

PLACEHOLDER = "<image>"
"""Where a training question puts its image; at its start or its end, which makes no difference."""

_ROLES = {"human": "user", "gpt": "assistant"}


def load_coin(config: CoinTask, split: Split, task: str) -> list[Prompt]:
    """The questions of one split: `eval_path` is the test split, or else a share of the images of `path`."""
    if split == "test" and config.eval_path is not None:
        return list(_prompts(Path(config.eval_path), config, task))
    prompts = list(islice(_prompts(Path(config.path), config, task), config.limit))
    return prompts if config.eval_path is not None else cut(prompts, config.holdout, split)


def _prompts(path: Path, config: CoinTask, task: str) -> Iterator[Prompt]:
    for number, (where, row) in enumerate(rows_of(read_json(path), str(path))):
        images = (image_in(Path(config.images), row["image"], where),) if row.get("image") is not None else ()
        turns = _conversation(row, where) if "conversations" in row else _question(row, where)
        for asked in range(0, len(turns), 2):
            gold = turns[asked + 1]["content"]
            if is_empty(gold):
                if config.unanswered == "drop":
                    continue
                raise ValueError(
                    f"{where}: the answer is empty; remove the annotation, or leave out such ones by `unanswered: drop`"
                )
            # A later question of a conversation may speak of an earlier one, so it comes with all before it.
            content = turns[0]["content"] if asked == 0 else tuple(turns[: asked + 1])
            name = f"{task}/{path.stem}/{number}" + (f"/{asked // 2}" if len(turns) > 2 else "")
            yield Prompt(name, content, gold, task, images=images)


def _question(row: Mapping[str, Any], where: str) -> list[Message]:
    """A test annotation as a conversation of two turns."""
    key = "answer_bbox" if "answer_bbox" in row and "answer" not in row else "answer"
    gold = "" if is_empty(row.get(key, 0)) else said(row, key, where)
    return [{"role": "user", "content": _bare(said(row, "text", where), where)}, {"role": "assistant", "content": gold}]


def _conversation(row: Mapping[str, Any], where: str) -> list[Message]:
    """The turns of a training annotation, questions and answers by turns."""
    turns: list[Message] = []
    for place, (inside, turn) in enumerate(rows_of(row["conversations"], f"{where}.conversations")):
        role = _ROLES.get(member(turn, "from", str, inside))
        if role != ("user", "assistant")[place % 2]:
            raise ValueError(f"{inside}: from '{turn['from']}'; turns have to be those of 'human' and 'gpt' by turns")
        value = member(turn, "value", str, inside)
        turns.append({"role": role, "content": _bare(value, inside) if role == "user" else value.strip()})
    if not turns or len(turns) % 2:
        raise ValueError(
            f"{where}.conversations: {len(turns)} turns; each question of 'human' needs an answer of 'gpt'"
        )
    return turns


def _bare(question: str, where: str) -> str:
    """The question without the mark of its image, which comes first anyway."""
    bare = question.replace(PLACEHOLDER, "", 1).strip()
    if not bare or PLACEHOLDER in bare:
        raise ValueError(
            f"{where}: the question is empty or names several images; it takes words and one {PLACEHOLDER}"
        )
    return bare
