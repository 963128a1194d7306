"""What is kept, how lags are drawn, and that the rollout log gives back what went in."""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from remix import replay
from remix.replay import (
    ReplayBuffer,
    lag_weights,
    logged_steps,
    read_shard,
    read_shards,
    remove_shards,
    shard_path,
    write_shard,
)
from remix.types import Prompt, Rollout, RolloutGroup, Score


def rollout(version: int, sample: int = 0, **known: Any) -> Rollout:
    return Rollout(
        prompt_ids=torch.tensor([3, 4]),
        response_ids=torch.tensor([5, 6, 1]),
        sampler_logprobs=torch.tensor([-0.5, -1.5, -2.5]),
        policy_version=version,
        finish_reason="stop",
        seed=sample,
        text="abc",
        score=Score(1.0, "correct", {"exact_match": 1.0}),
        **known,
    )


def group(version: int, name: int, size: int = 2) -> RolloutGroup:
    prompt = Prompt(f"{version}/{name}", "1+1=", "2", "sum", (3, 4))
    return RolloutGroup(prompt, tuple(rollout(version, sample) for sample in range(size)))


def filled(sizes: dict[int, int], window: int) -> ReplayBuffer:
    """`sizes`: groups by the step that sampled them."""
    buffer = ReplayBuffer(window)
    for version, count in sorted(sizes.items()):
        buffer.add([group(version, name) for name in range(count)], version)
    return buffer


# --- the weights of lags ------------------------------------------------------------------------------------------


def test_lag_weights_by_hand() -> None:
    assert lag_weights([1, 2, 3], "uniform").tolist() == [1 / 3, 1 / 3, 1 / 3]
    # 1/2, 1/4, 1/8 over their sum 7/8
    assert lag_weights([1, 2, 3], "geometric") == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=1e-15)
    # 1, 1/2, 1/3 over their sum 11/6
    assert lag_weights([1, 2, 3], "age") == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=1e-15)


def test_lag_weights_are_of_the_lags_given_not_of_their_places() -> None:
    # 2^-2, 2^-4: 4 to 1; 1/2, 1/4: 2 to 1
    assert lag_weights([2, 4], "geometric") == pytest.approx([0.8, 0.2], abs=1e-15)
    assert lag_weights([2, 4], "age") == pytest.approx([2 / 3, 1 / 3], abs=1e-15)
    assert lag_weights([7], "geometric").tolist() == [1.0]


# --- what is kept -------------------------------------------------------------------------------------------------


def test_the_buffer_keeps_what_the_next_step_may_draw() -> None:
    buffer = filled({0: 2, 1: 3, 2: 4}, window=2)
    # Step 3 may draw lags 1 and 2: versions 2 and 1.
    assert buffer.versions == [1, 2]
    assert buffer.available(step=3, window=2) == 4 + 3
    assert buffer.available(step=3, window=1) == 4
    # The step's own rollouts are fresh, not replay: at step 2 only lag 1 is here.
    assert buffer.available(step=2, window=2) == 3
    # Nothing was sampled between: lag 4 and 5 lie outside.
    assert buffer.available(step=6, window=2) == 0
    buffer.clear()
    assert buffer.versions == []
    assert buffer.available(step=3, window=2) == 0


def test_a_window_of_zero_keeps_nothing() -> None:
    assert filled({0: 2, 1: 2}, window=0).versions == []


def test_a_step_without_groups_is_skipped_by_the_draw() -> None:
    buffer = filled({0: 2, 1: 0}, window=2)
    drawn = buffer.draw(2, step=2, window=2, distribution="uniform", rng=np.random.default_rng(0))
    assert {g.policy_version for g in drawn} == {0}
    assert len(drawn) == 2


# --- the draw -----------------------------------------------------------------------------------------------------


def test_groups_are_drawn_whole_and_without_repetition() -> None:
    buffer = filled({3: 3, 4: 5}, window=2)
    for seed in range(20):
        drawn = buffer.draw(8, step=5, window=2, distribution="age", rng=np.random.default_rng(seed))
        assert len({g.prompt.id for g in drawn}) == 8
        assert all(len(g.rollouts) == 2 for g in drawn)
    assert buffer.available(step=5, window=2) == 8, "a draw takes nothing away"
    more = buffer.draw(100, step=5, window=2, distribution="age", rng=np.random.default_rng(0))
    assert len(more) == 8, "fewer where fewer are there"
    assert buffer.draw(0, step=5, window=2, distribution="age", rng=np.random.default_rng(0)) == []


def test_the_window_bounds_the_draw() -> None:
    buffer = filled({1: 4, 2: 4, 3: 4}, window=3)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        drawn = buffer.draw(8, step=4, window=2, distribution="uniform", rng=rng)
        assert Counter(g.policy_version for g in drawn) == {2: 4, 3: 4}


def test_the_same_generator_draws_the_same_groups() -> None:
    buffer = filled({1: 6, 2: 6}, window=2)
    a, b, other = (
        [
            g.prompt.id
            for g in buffer.draw(5, step=3, window=2, distribution="uniform", rng=np.random.default_rng((seed, 3, 1)))
        ]
        for seed in (0, 0, 1)
    )
    assert a == b
    assert a != other


@pytest.mark.parametrize(
    ("distribution", "share_of_lag_1"),
    # Lags 1 and 3: 1/2; 2^-1 : 2^-3 = 4 : 1; 1 : 1/3 = 3 : 1. Version 4 holds 6 groups, version 2 only 2.
    [("uniform", 0.5), ("geometric", 0.8), ("age", 0.75)],
)
def test_lags_follow_nu_whatever_each_holds(distribution: replay.LagDistribution, share_of_lag_1: float) -> None:
    buffer = filled({2: 2, 4: 6}, window=3)
    rng = np.random.default_rng(1)
    draws = 3000
    seen = Counter(
        buffer.draw(1, step=5, window=3, distribution=distribution, rng=rng)[0].prompt.id for _ in range(draws)
    )
    expected = {f"4/{i}": share_of_lag_1 / 6 for i in range(6)} | {f"2/{i}": (1 - share_of_lag_1) / 2 for i in range(2)}
    statistic = sum((seen[name] - draws * p) ** 2 / (draws * p) for name, p in expected.items())
    assert statistic < 24.3, "chi-square, 7 degrees of freedom, 0.1 %"


def test_an_exhausted_lag_leaves_its_share_to_the_others() -> None:
    buffer = filled({3: 4, 4: 1}, window=2)
    drawn = buffer.draw(4, step=5, window=2, distribution="geometric", rng=np.random.default_rng(0))
    assert Counter(g.policy_version for g in drawn)[3] >= 3
    assert len({g.prompt.id for g in drawn}) == 4


# --- the rollout log ----------------------------------------------------------------------------------------------

ODD_FLOATS = torch.tensor([-0.1, 1e-45, float(np.float32(1) / np.float32(3))])
"""Not representable in few digits; the second is the smallest subnormal."""


def full_group() -> RolloutGroup:
    known = {
        "advantage": ODD_FLOATS,
        "behaviour_logprobs": ODD_FLOATS * 2,
        "reference_logprobs": ODD_FLOATS - 1,
        "precedent_logprobs": -ODD_FLOATS,
    }
    prompt = Prompt("sum/train/7", "1+2=", "3", "sum", (3, 4))
    first = rollout(4, 0, **known)
    second = Rollout(
        prompt_ids=torch.tensor([3, 4]),
        response_ids=torch.tensor([2**31 - 1]),
        sampler_logprobs=torch.tensor([-math.pi]),
        policy_version=4,
        finish_reason="length",
        seed=2**31 - 1,
        text='ä "quoted"\n\x00',
        score=Score(0.1 + 0.2, "no_answer", {"format": 0.1, "length": -1.0}),
    )
    return RolloutGroup(prompt, (first, second))


def bits(value: object) -> object:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    return struct.pack("<d", value) if isinstance(value, float) else value


def assert_same(a: RolloutGroup, b: RolloutGroup) -> None:
    assert a.prompt == b.prompt
    assert len(a.rollouts) == len(b.rollouts)
    for one, other in zip(a.rollouts, b.rollouts, strict=True):
        for field in fields(Rollout):
            assert bits(getattr(one, field.name)) == bits(getattr(other, field.name)), field.name


def test_a_shard_gives_back_every_bit(tmp_path: Path) -> None:
    kept = [full_group(), group(4, 0, size=3)]
    path = shard_path(tmp_path, 4)
    write_shard(path, 4, kept, dropped=[group(4, 99)])
    back = read_shard(path)
    assert len(back) == 2, "dropped groups are logged, not replayed"
    for written, read in zip(kept, back, strict=True):
        assert_same(written, read)
    assert back[0].rollouts[1].advantage is None
    # Written again it is the same once more.
    write_shard(tmp_path / "again.parquet", 4, back)
    for written, read in zip(kept, read_shard(tmp_path / "again.parquet"), strict=True):
        assert_same(written, read)


def test_a_conversation_comes_back_as_one(tmp_path: Path) -> None:
    turns = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"})
    before = RolloutGroup(Prompt("chat", turns, "2", "sum", (3, 4)), (rollout(0),))
    like_json = RolloutGroup(Prompt("text", '[{"role": "user"}]', "2", "sum", (3, 4)), (rollout(0),))
    pictures = RolloutGroup(Prompt("see", "what?", "2", "sum", (3, 4), ("a.png", "b.png")), (rollout(0),))
    write_shard(tmp_path / "x.parquet", 0, [before, like_json, pictures])
    assert [g.prompt for g in read_shard(tmp_path / "x.parquet")] == [before.prompt, like_json.prompt, pictures.prompt]


def test_resuming_from_shards_draws_what_the_interrupted_run_would(tmp_path: Path) -> None:
    buffer, resumed = filled({4: 5, 5: 5}, window=2), ReplayBuffer(2)
    for version in buffer.versions:
        write_shard(shard_path(tmp_path, version), version, [group(version, name) for name in range(5)])
    for version in buffer.versions:
        resumed.add(read_shard(shard_path(tmp_path, version)), version)
    a, b = (
        replayed.draw(6, step=6, window=2, distribution="age", rng=np.random.default_rng(3))
        for replayed in (buffer, resumed)
    )
    assert [g.prompt.id for g in a] == [g.prompt.id for g in b]
    for one, other in zip(a, b, strict=True):
        assert_same(one, other)


def test_the_parts_of_several_processes_are_the_step_of_one(tmp_path: Path) -> None:
    groups, dropped = [group(4, name) for name in range(4)], [group(4, 9)]
    write_shard(shard_path(tmp_path, 4), 4, groups, dropped)
    for rank, only in enumerate(([1, 4], [], [0, 2, 3])):  # one that has none writes its part as well
        write_shard(shard_path(tmp_path / "three", 4, rank, 3), 4, groups, dropped, only=only)
    steps = logged_steps(tmp_path / "three")
    assert [path.name for path in steps[4]] == [f"step=000004-rank={r:04d}-of=0003.parquet" for r in range(3)]
    one = read_shards(logged_steps(tmp_path)[4])
    for known, found in zip(one, read_shards(reversed(steps[4])), strict=True):
        assert_same(known, found)
    rows, parts = pq.read_table(shard_path(tmp_path, 4)), [pq.read_table(path) for path in steps[4]]
    assert pa.concat_tables(parts).sort_by([("group", "ascending"), ("sample", "ascending")]).equals(rows)


def test_a_step_is_there_when_all_its_parts_are(tmp_path: Path) -> None:
    for step, ranks in ((0, [0, 1]), (1, [0]), (2, [1, 0])):
        for rank in ranks:
            write_shard(shard_path(tmp_path, step, rank, 2), step, [group(step, 0), group(step, 1)], only=[rank])
    write_shard(shard_path(tmp_path, 3), 3, [group(3, 0)])
    shard_path(tmp_path, 3, 1, 2).with_name("step=000003-rank=0001-of=0002.parquet.tmp").write_bytes(b"PAR1")
    shard_path(tmp_path, 3).with_name("notes.txt").write_text("somebody else's")
    assert {step: len(paths) for step, paths in logged_steps(tmp_path).items()} == {0: 2, 2: 2, 3: 1}
    remove_shards(tmp_path, from_step=2)
    assert sorted(path.name for path in shard_path(tmp_path, 0).parent.iterdir()) == [
        "notes.txt",
        *(f"step=000000-rank={rank:04d}-of=0002.parquet" for rank in (0, 1)),
        "step=000001-rank=0000-of=0002.parquet",
    ]


def test_a_shard_without_groups_is_a_shard(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0), 0, [])
    assert read_shard(shard_path(tmp_path, 0)) == []


def test_an_empty_response_keeps_its_type(tmp_path: Path) -> None:
    none = torch.tensor([], dtype=torch.int64)
    before = RolloutGroup(
        Prompt("p", "", "2", "sum"), (Rollout(none, none, torch.zeros(0), 0, "stop", 0, "", Score(0.0, "wrong")),)
    )
    write_shard(tmp_path / "x.parquet", 0, [before])
    assert_same(before, read_shard(tmp_path / "x.parquet")[0])


def test_a_flipped_bit_is_never_read_as_something_else(tmp_path: Path) -> None:
    path = shard_path(tmp_path, 4)
    write_shard(path, 4, [full_group()])
    content, kept = path.read_bytes(), read_shard(path)
    refusals = []
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert_same(read_shard(path)[0], kept[0])
        except ValueError as error:
            refusals.append(error)
    assert len(refusals) > 100
    assert {type(error) for error in refusals} == {ValueError}, "none of pyarrow's own"
    assert all(str(error).startswith(f"{path}: no whole rollout log (") for error in refusals)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100, b"PAR1" + bytes(8) + b"PAR1"])
def test_what_is_no_shard_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet: no whole rollout log .*resume from a checkpoint before it"):
        read_shard(tmp_path / "x.parquet")


def test_columns_of_another_table_are_no_shard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"step": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="its columns are not those of this version"):
        read_shard(tmp_path / "x.parquet")


def test_a_crash_in_between_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard_path(tmp_path, 2)
    write_shard(path, 2, [group(2, 0)])
    assert [file.name for file in path.parent.iterdir()] == ["step=000002.parquet"]
    before = path.read_bytes()

    real = pq.write_table

    def cut_short(table: Any, where: Any, **options: Any) -> None:
        real(table, where, **options)
        raise OSError("disk full")

    monkeypatch.setattr(replay.pq, "write_table", cut_short)
    with pytest.raises(OSError, match="disk full"):
        write_shard(path, 2, [group(2, 0), group(2, 1)])
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_shard(path, 2, [group(2, 0), group(2, 1)])
    assert len(read_shard(path)) == 2
    assert [file.name for file in path.parent.iterdir()] == ["step=000002.parquet"]


def test_anyone_reads_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_shard(shard_path(tmp_path, 0), 0, [full_group()])
    write_shard(shard_path(tmp_path, 1), 1, [], dropped=[group(1, 0)])
    folder = tmp_path / "rollouts"

    rows = pq.read_table(shard_path(tmp_path, 0)).to_pylist()
    assert [row["sample"] for row in rows] == [0, 1]
    assert rows[0]["response_ids"] == [5, 6, 1]
    assert rows[1]["behaviour_logprobs"] is None

    from datasets import load_dataset

    files = [str(path) for path in sorted(folder.glob("*.parquet"))]
    table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["step"] == [0, 0, 1, 1]
    assert table["reward"] == [1.0, 0.1 + 0.2, 1.0, 1.0]
    assert table["replayable"] == [True, True, False, False]
