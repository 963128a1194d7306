"""What is kept of the rollouts, how lags are drawn, how fresh and stale are mixed.

The store on disk is the rollout log: Parquet shards, one of each process for a training step, which anyone opens with
`datasets` and from which a resumed run takes its replay back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from remix.durable import written_whole
from remix.terminal import printable
from remix.types import Prompt, Rollout, RolloutGroup, Score

LagDistribution = Literal["uniform", "geometric", "age"]


def lag_weights(lags: Sequence[int], distribution: LagDistribution) -> np.ndarray:
    """ν over the given lags (>= 1), summing to 1: uniform, proportional to 2^-lag, or to 1/lag."""
    lags_ = np.asarray(lags, dtype=np.float64)
    weights = {"uniform": np.ones_like(lags_), "geometric": 2.0**-lags_, "age": 1.0 / lags_}[distribution]
    normalised: np.ndarray = weights / weights.sum()
    return normalised


class ReplayBuffer:
    """Whole groups of past steps, by the policy version that sampled them."""

    def __init__(self, window: int) -> None:
        """`window`: N, the oldest lag that may still be drawn, over all phases."""
        self.window = window
        self._groups: dict[int, tuple[RolloutGroup, ...]] = {}

    def add(self, groups: Iterable[RolloutGroup], step: int) -> None:
        """Keeps the groups sampled at `step` and forgets those that have left the window."""
        self._groups[step] = tuple(groups)
        for version in [version for version in self._groups if step - version >= self.window]:
            del self._groups[version]

    def clear(self) -> None:
        self._groups.clear()

    @property
    def versions(self) -> list[int]:
        """Policy versions held, oldest first."""
        return sorted(self._groups)

    def available(self, step: int, window: int) -> int:
        """Groups that step may draw: lags 1..window."""
        return sum(len(groups) for version, groups in self._groups.items() if 1 <= step - version <= window)

    def draw(
        self, count: int, *, step: int, window: int, distribution: LagDistribution, rng: np.random.Generator
    ) -> list[RolloutGroup]:
        """`count` groups without repetition: for each a lag i ~ ν over those not yet exhausted, then one of its
        groups. Fewer where fewer are there."""
        pools = {
            step - version: list(groups)
            for version, groups in sorted(self._groups.items())
            if 1 <= step - version <= window and groups
        }
        drawn: list[RolloutGroup] = []
        while pools and len(drawn) < count:
            lags = sorted(pools)
            lag = lags[rng.choice(len(lags), p=lag_weights(lags, distribution))]
            drawn.append(pools[lag].pop(rng.integers(len(pools[lag]))))
            if not pools[lag]:
                del pools[lag]
        return drawn


# --- the rollout log ----------------------------------------------------------------------------------------------

_TOKENS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("group", pa.int32()),
        ("sample", pa.int32()),
        ("task", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("conversation", pa.bool_()),
        ("images", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("verdict", pa.string()),
        ("reward_parts", pa.string()),
        ("finish_reason", pa.string()),
        ("replayable", pa.bool_()),
        ("policy_version", pa.int32()),
        ("seed", pa.int64()),
        ("prompt_ids", _TOKENS),
        ("response_ids", _TOKENS),
        ("sampler_logprobs", _FLOATS),
        ("behaviour_logprobs", _FLOATS),
        ("reference_logprobs", _FLOATS),
        ("precedent_logprobs", _FLOATS),
        ("advantage", _FLOATS),
    ]
)


_NAME = re.compile(r"step=(\d+)(?:-rank=(\d+)-of=(\d+))?\.parquet(\.tmp)?")


def shard_path(run_dir: Path, step: int, rank: int = 0, world_size: int = 1) -> Path:
    """Where one of `world_size` processes writes its part of a step. The step is whole when all of them are there."""
    part = f"-rank={rank:04d}-of={world_size:04d}" if world_size > 1 else ""
    return run_dir / "rollouts" / f"step={step:06d}{part}.parquet"


def write_shard(
    path: Path,
    step: int,
    kept: Sequence[RolloutGroup],
    dropped: Sequence[RolloutGroup] = (),
    only: Iterable[int] | None = None,
) -> None:
    """Writes the rollouts of a step; `dropped` groups are logged but not replayed. The file appears whole or not.

    `only`: the groups that are this file's, by their number among all; None = every one.
    """
    groups = [*kept, *dropped]
    rows = [
        _row(step, index, sample, groups[index], rollout, replayable=index < len(kept))
        for index in (range(len(groups)) if only is None else only)
        for sample, rollout in enumerate(groups[index].rollouts)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:  # and on the disk: a checkpoint will count on it
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)  # a flipped bit is no other token


def remove_shards(run_dir: Path, from_step: int) -> None:
    """Takes away what lies beyond the step that a run goes on from, and what a kill left half-written."""
    for path in shard_path(run_dir, 0).parent.iterdir() if shard_path(run_dir, 0).parent.is_dir() else ():
        named = _NAME.fullmatch(path.name)
        if named is not None and (named[4] or int(named[1]) >= from_step):
            path.unlink()


def logged_steps(run_dir: Path) -> dict[int, list[Path]]:
    """The shards of every step that is there whole, oldest first; of one that a kill cut short there are fewer."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(shard_path(run_dir, 0).parent.glob("step=*.parquet")):
        named = _NAME.fullmatch(path.name)
        if named is not None:
            found.setdefault((int(named[1]), int(named[3] or 1)), []).append(path)
    return {step: paths for (step, world_size), paths in sorted(found.items()) if len(paths) == world_size}


def shard_step(name: str) -> int | None:
    """Of a file's name; None where it is no shard's."""
    named = _NAME.fullmatch(name)
    return None if named is None else int(named[1])


def read_shards(paths: Iterable[Path]) -> list[RolloutGroup]:
    """The replayable groups of a step from all of its shards, as they were written and in their order. Raises
    ValueError where a file is not whole."""
    groups = sorted((numbered for path in paths for numbered in _read(path)), key=lambda numbered: numbered[0])
    return [group for _, group in groups]


def read_shard(path: Path) -> list[RolloutGroup]:
    """Of one shard."""
    return read_shards([path])


def _read(path: Path) -> list[tuple[int, RolloutGroup]]:
    groups: dict[int, list[tuple[Prompt, Rollout]]] = {}
    try:
        for row in _read_table(path).to_pylist():
            if row["replayable"]:
                groups.setdefault(row["group"], []).append(_rollout(row))
    except (pa.ArrowException, OSError, MemoryError, ValueError, TypeError, LookupError) as error:
        reason = " ".join(printable(str(error)[:500]).split())
        raise ValueError(f"{path}: no whole rollout log ({reason}); resume from a checkpoint before it") from None
    return [
        (number, RolloutGroup(members[0][0], tuple(rollout for _, rollout in members)))
        for number, members in groups.items()
    ]


def _read_table(path: Path) -> pa.Table:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if not file.schema_arrow.equals(_SCHEMA):
            raise ValueError("its columns are not those of this version")
        table = file.read()
        if table.num_rows != file.metadata.num_rows:
            raise ValueError(f"{table.num_rows} of {file.metadata.num_rows} rows")
        return table


def _row(
    step: int, index: int, sample: int, group: RolloutGroup, rollout: Rollout, *, replayable: bool
) -> dict[str, Any]:
    prompt, score = group.prompt, rollout.score
    assert score is not None, "a rollout is logged after it was scored"
    return {
        "step": step,
        "group": index,
        "sample": sample,
        "task": prompt.task,
        "prompt_id": prompt.id,
        "prompt": prompt.content if isinstance(prompt.content, str) else json.dumps([dict(m) for m in prompt.content]),
        "conversation": not isinstance(prompt.content, str),
        "images": list(prompt.images),
        "answer": prompt.answer,
        "response": rollout.text,
        "reward": score.value,
        "verdict": score.verdict,
        "reward_parts": json.dumps(dict(score.parts)),
        "finish_reason": rollout.finish_reason,
        "replayable": replayable,
        "policy_version": rollout.policy_version,
        "seed": rollout.seed,
        "prompt_ids": rollout.prompt_ids.numpy(),
        "response_ids": rollout.response_ids.numpy(),
        "sampler_logprobs": rollout.sampler_logprobs.numpy(),
        "behaviour_logprobs": _array(rollout.behaviour_logprobs),
        "reference_logprobs": _array(rollout.reference_logprobs),
        "precedent_logprobs": _array(rollout.precedent_logprobs),
        "advantage": _array(rollout.advantage),
    }


def _rollout(row: dict[str, Any]) -> tuple[Prompt, Rollout]:
    def floats(name: str) -> Tensor | None:
        return None if row[name] is None else torch.tensor(row[name], dtype=torch.float32)

    content = tuple(json.loads(row["prompt"])) if row["conversation"] else row["prompt"]
    images = tuple(row["images"])
    prompt = Prompt(row["prompt_id"], content, row["answer"], row["task"], tuple(row["prompt_ids"]), images)
    return prompt, Rollout(
        prompt_ids=torch.tensor(row["prompt_ids"], dtype=torch.int64),
        response_ids=torch.tensor(row["response_ids"], dtype=torch.int64),
        sampler_logprobs=torch.tensor(row["sampler_logprobs"], dtype=torch.float32),
        policy_version=row["policy_version"],
        finish_reason=row["finish_reason"],
        seed=row["seed"],
        text=row["response"],
        score=Score(row["reward"], row["verdict"], json.loads(row["reward_parts"])),
        advantage=floats("advantage"),
        behaviour_logprobs=floats("behaviour_logprobs"),
        reference_logprobs=floats("reference_logprobs"),
        precedent_logprobs=floats("precedent_logprobs"),
        images=images,
    )


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()
