"""The tasks of a recipe side by side, and the order in which a run draws prompts from them."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import PurePath
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from remix.config import ArithmeticTask, CoinTask, HubTask, JsonlTask, MfeEtpTask, ShapesTask, TaskConfig
from remix.tasks.arithmetic import generate, problems
from remix.tasks.coin import load_coin
from remix.tasks.exclusion import load_exclusion
from remix.tasks.hub import load_hub
from remix.tasks.jsonl import load_jsonl
from remix.tasks.mfe_etp import load_mfe_etp
from remix.tasks.rows import Split
from remix.tasks.shapes import make_prompts
from remix.types import Prompt

EVAL_SIZE = 1024
"""Most held-out problems that are generated for a task that has endless ones."""


@dataclass(frozen=True, slots=True)
class TaskSet:
    """One split of one task."""

    name: str
    """Unique in the mixture; also the `task` of its prompts."""
    weight: float
    """Share of the draws, relative to the others'."""
    prompts: tuple[Prompt, ...]
    excluded: int = 0
    """How many problems were left out because a benchmark holds them."""


def load_arithmetic(config: ArithmeticTask, split: Split, task: str) -> list[Prompt]:
    """`size` problems to train on; at most `EVAL_SIZE` held-out ones, or as many as there are."""
    size = config.size
    if split == "test":
        lengths = range(config.min_terms, config.max_terms + 1)
        sources = [problems(kind, terms, split, config.seed) for terms in lengths for kind in config.kinds]
        size = min(size, EVAL_SIZE)
        size = min(size, sum(1 for source in sources for _ in islice(source, size)))
    return generate(
        kinds=config.kinds,
        min_terms=config.min_terms,
        max_terms=config.max_terms,
        split=split,
        size=size,
        seed=config.seed,
    )


def load_shapes(config: ShapesTask, split: Split, task: str) -> list[Prompt]:
    """`size` questions to train on; at most `EVAL_SIZE` held-out ones."""
    return make_prompts(
        config.kind, split, config.size if split == "train" else min(config.size, EVAL_SIZE), config.seed
    )


TASKS: dict[str, Callable[[Any, Split, str], list[Prompt]]] = {
    "arithmetic": load_arithmetic,
    "shapes": load_shapes,
    "jsonl": load_jsonl,
    "hub": load_hub,
    "coin": load_coin,
    "mfe_etp": load_mfe_etp,
}
"""By `type:`, what loads a split under a name. A new task is a file with such a function and a row here."""


def task_names(configs: Sequence[TaskConfig]) -> list[str]:
    """What the tasks of a recipe are called, in order; none twice."""
    names: list[str] = []
    for config in configs:
        names.append(_unused(_name(config), set(names)))
    return names


def load_tasks(configs: Sequence[TaskConfig], split: Split) -> list[TaskSet]:
    """One set per task, in order. A task with `holdout: 0` and no evaluation split of its own has no test set."""
    sets: list[TaskSet] = []
    ids = set[str]()
    for name, config in zip(task_names(configs), configs, strict=True):
        if split == "test" and _keeps_none_back(config):
            continue
        prompts = found = TASKS[config.type](config, split, name)
        if _is_excluded_from(config, split):
            prompts = load_exclusion(config.exclude, config.exclude_dir, config.exclude_overlap).without(found)
        if not prompts:
            raise ValueError(f"task '{name}' has no {split} problems; {_remedy(config, split)}")
        # Two files may both number their rows from 0: the later task's ids then go by its name.
        clash = any(prompt.id in ids for prompt in prompts)
        named = tuple(
            replace(prompt, id=f"{name}/{prompt.id}" if clash else prompt.id, task=name) for prompt in prompts
        )
        ids.update(prompt.id for prompt in named)
        sets.append(TaskSet(name, config.weight, named, excluded=len(found) - len(prompts)))
    if not sets:
        raise ValueError("no task has held-out problems; give one a `holdout` above 0 or a test split of its own")
    return sets


def eval_prompts(sets: Sequence[TaskSet], count: int, seed: int) -> list[Prompt]:
    """A fixed choice of at most `count` prompts, task by task.

    Shares follow the weights; what a task is too small to fill goes to the others. A larger count only adds prompts.
    """
    left = [sorted(task.prompts, key=lambda prompt: _rank(seed, prompt.id)) for task in sets]
    chosen: list[list[Prompt]] = [[] for _ in sets]
    for _ in range(min(count, sum(map(len, left)))):
        # To whom one more is due: the smallest (chosen + 1) / weight, which keeps shares as even as they can be.
        due = [place for place in range(len(sets)) if len(chosen[place]) < len(left[place])]
        place = min(due, key=lambda place: ((len(chosen[place]) + 1) / sets[place].weight, place))
        chosen[place].append(left[place][len(chosen[place])])
    return [prompt for task in chosen for prompt in task]


def named_apart(prompts: Sequence[Prompt], earlier: Sequence[str]) -> list[Prompt]:
    """The same prompts; one that was drawn before, here or among the `earlier` ids, gets a name of its own.

    Sampling seeds come from names, so without it a prompt that two epochs bring into one step would be answered twice
    in the same words.
    """
    seen = Counter(earlier)
    named = []
    for prompt in prompts:
        repeats = seen[prompt.id]
        seen[prompt.id] += 1
        named.append(replace(prompt, id=f"{prompt.id}#{repeats + 1}") if repeats else prompt)
    return named


class PromptStream:
    """An endless order over a mixture, fixed by the sets and the seed: draw i is the same whoever asks, and when.

    Which task a draw goes to follows the golden-ratio sequence, whose counts stay within a few of weight x draws at any
    time. Each task walks its own prompts epoch by epoch, in a new order every epoch.
    """

    def __init__(self, sets: Sequence[TaskSet], seed: int) -> None:
        if not sets or not all(task.prompts for task in sets):
            raise ValueError("a stream of prompts needs at least one task, each with at least one prompt")
        self._sets = tuple(sets)
        self._seed = seed
        total = sum(task.weight for task in sets)
        cumulative = np.cumsum([task.weight / total for task in sets])[:-1]
        self._bounds = np.array([min(int(share * 2**64), 2**64 - 1) for share in cumulative.tolist()], dtype=np.uint64)
        self._offset = _rank(seed, "offset")
        self._task_N: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._turn_N: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._orders: dict[tuple[int, int], list[int]] = {}

    def take(self, position: int, count: int) -> list[Prompt]:
        """Draws position, position + 1, ..., position + count - 1."""
        if position + count > len(self._task_N):
            self._plan(max(2 * len(self._task_N), position + count, 4096))
        drawn = slice(position, position + count)
        return [
            self._prompt(task, turn)
            for task, turn in zip(self._task_N[drawn].tolist(), self._turn_N[drawn].tolist(), strict=True)
        ]

    def _plan(self, draws: int) -> None:
        """For each of so many draws from the very first: which task, and how many draws that task had before."""
        # frac(offset + i / golden ratio) in units of 2^-64: exact in integers, so the same on every machine.
        step = np.uint64(0x9E3779B97F4A7C15)
        points = np.arange(draws, dtype=np.uint64) * step + np.uint64(self._offset)
        self._task_N = np.searchsorted(self._bounds, points, side="right").astype(np.int64)
        self._turn_N = np.empty(draws, dtype=np.int64)
        for task in range(len(self._sets)):
            mine = self._task_N == task
            self._turn_N[mine] = np.arange(np.count_nonzero(mine))

    def _prompt(self, task: int, turn: int) -> Prompt:
        prompts = self._sets[task].prompts
        epoch, place = divmod(turn, len(prompts))
        return prompts[self._order(task, epoch)[place]]

    def _order(self, task: int, epoch: int) -> list[int]:
        if (task, epoch) not in self._orders:
            order = list(range(len(self._sets[task].prompts)))
            random.Random(f"{self._seed}/{self._sets[task].name}/{epoch}").shuffle(order)
            # A batch may straddle two epochs, so the one before is worth keeping; older ones are not.
            self._orders.pop((task, epoch - 2), None)
            self._orders[task, epoch] = order
        return self._orders[task, epoch]


def _rank(seed: int, text: str) -> int:
    """64 bits that look random and depend on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8])


def _name(config: TaskConfig) -> str:
    """`gsm8k` of `data/gsm8k.jsonl.gz` or `openai/gsm8k`, `gqa` of `gqa/train.json`; others go by kind or type."""
    if config.label is not None:
        return config.label
    match config:
        case ArithmeticTask():
            return config.type
        case ShapesTask():
            return config.kind
        case MfeEtpTask():
            return config.kinds[0] if len(config.kinds) == 1 else config.type
    path = PurePath(config.path)
    name = path.name.split(".")[0] or path.name
    return path.parent.name or name if isinstance(config, CoinTask) and name == "train" else name


def _unused(name: str, taken: set[str]) -> str:
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name}_{number}"
    return unused


def _keeps_none_back(config: TaskConfig) -> bool:
    match config:
        case JsonlTask() | CoinTask():
            return config.holdout == 0 and config.eval_path is None
        case HubTask():
            return config.holdout == 0 and config.eval_split is None
        case MfeEtpTask():
            return config.holdout == 0
        case _:
            return False


def _is_excluded_from(config: TaskConfig, split: Split) -> TypeGuard[JsonlTask | HubTask]:
    """Whether `exclude` speaks of this split: not of one that is held out by itself."""
    match config:
        case JsonlTask():
            own = config.eval_path is not None
        case HubTask():
            own = config.eval_split is not None
        case _:
            return False
    return bool(config.exclude) and (split == "train" or not own)


def _remedy(config: TaskConfig, split: Split) -> str:
    match config:
        case ArithmeticTask():
            return "raise max_terms or add a kind, so that there are more problems"
        case ShapesTask():
            return "raise size"
        case MfeEtpTask():
            return f"check {config.path}, `kinds` and `holdout` ({config.holdout}), which leave nothing on this side"
        case JsonlTask() | CoinTask():
            own, source = "eval_path", config.path if split == "train" else config.eval_path or config.path
        case HubTask():
            own, source = "eval_split", config.path
    exclude = () if isinstance(config, CoinTask) else config.exclude
    excluded = f" and not excluded whole by {', '.join(exclude)}" if exclude else ""
    return (
        f"check that {source} is not empty{excluded}; where `holdout` ({config.holdout}) leaves nothing on this side, "
        f"change it or set `{own}`" + ("; `holdout: 0` leaves the task out of evaluation" if split == "test" else "")
    )
