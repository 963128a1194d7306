"""Replay: what the rollout log gives back, from whole and from damaged files, and the buffer beside a simple model."""

from __future__ import annotations

import functools
import struct
import tempfile
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from remix.replay import LagDistribution, ReplayBuffer, read_shard, shard_path, write_shard
from remix.types import FinishReason, Prompt, Rollout, RolloutGroup, Score, Verdict
from tests.fuzz.harness import Outcome, Tools

Draw = Any

# --- the same, bit for bit ----------------------------------------------------------------------------------------


def bits(value: Any) -> Any:
    """Comparable to the last bit, where nan equals itself and -0 is not 0."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, dict):
        return [(key, bits(inner)) for key, inner in value.items()]
    if isinstance(value, (Rollout, RolloutGroup, Score)):
        return [bits(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, Prompt):
        return astuple(value)
    return [bits(inner) for inner in value] if isinstance(value, tuple) else value


def same(groups: list[RolloutGroup], others: list[RolloutGroup]) -> bool:
    return [bits(group) for group in groups] == [bits(group) for group in others]


# --- groups -------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=12)
TORN_TEXT = TEXT | st.text(st.characters(categories=["Cs", "Ll"]), max_size=3)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(lambda ids: torch.tensor(ids, dtype=torch.int64))
FLOATS32 = st.floats(width=32).map(
    lambda value: float("nan") if value != value else value
)  # quiet, as arithmetic makes it


def _floats(size: int) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(FLOATS32, min_size=size, max_size=size).map(lambda row: torch.tensor(row, dtype=torch.float32))


@st.composite
def groups(draw: Draw, text: st.SearchStrategy[str] = TEXT) -> RolloutGroup:
    # A conversation is kept as JSON, which joins the halves of a surrogate pair; tasks let neither half in.
    turns = st.lists(st.dictionaries(TEXT, TEXT, max_size=3), max_size=3).map(tuple)
    prompt_ids, version = draw(IDS), draw(st.integers(0, 2**31 - 1))
    prompt = Prompt(
        id=draw(text),
        content=draw(text | turns),
        answer=draw(text),
        task=draw(text),
        token_ids=tuple(prompt_ids.tolist()),
        images=tuple(draw(st.lists(text, max_size=2))),
    )
    rollouts = []
    for _ in range(draw(st.integers(1, 3))):
        response = draw(IDS)
        row = _floats(len(response))
        known = {
            name: draw(st.none() | row)
            for name in ("advantage", "behaviour_logprobs", "reference_logprobs", "precedent_logprobs")
        }
        rollouts.append(
            Rollout(
                prompt_ids=prompt_ids,
                response_ids=response,
                sampler_logprobs=draw(row),
                policy_version=version,
                finish_reason=draw(st.sampled_from(get_args(FinishReason))),
                seed=draw(st.integers(-(2**63), 2**63 - 1)),
                images=prompt.images,
                text=draw(text),
                score=Score(
                    draw(FLOATS32 | st.floats(allow_nan=False)),
                    draw(st.sampled_from(get_args(Verdict))),
                    draw(st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False), max_size=2)),
                ),
                **known,
            )
        )
    return RolloutGroup(prompt, tuple(rollouts))


Written = tuple[int, list[RolloutGroup], list[RolloutGroup]]
"""Step, kept groups, dropped groups."""
WRITTEN = st.tuples(st.integers(0, 2**31 - 1), st.lists(groups(), max_size=3), st.lists(groups(), max_size=1))
TORN = st.tuples(st.just(0), st.lists(groups(TORN_TEXT), min_size=1, max_size=2), st.just([]))


def check_round_trip(tools: Tools, written: Written) -> Outcome:
    step, kept, dropped = written
    path = tools.folder / "round_trip.parquet"
    path.unlink(missing_ok=True)
    try:
        write_shard(path, step, kept, dropped)
    except ValueError:
        # Half a surrogate pair is no text: no tokenizer emits it, and no task lets it in.
        assert any(0xD800 <= ord(char) <= 0xDFFF for char in all_text(kept)), "only that may be refused"
        assert not path.exists()
        return "refused"
    assert same(read_shard(path), kept)
    return "accepted"


def all_text(kept: list[RolloutGroup]) -> str:
    """Every text of the groups, one after the other."""
    parts: list[str] = []
    for group in kept:
        prompt = group.prompt
        parts += [prompt.id, prompt.answer, prompt.task, *prompt.images, *(rollout.text for rollout in group.rollouts)]
        parts += [prompt.content] if isinstance(prompt.content, str) else []
    return "".join(parts)


# --- damaged files ------------------------------------------------------------------------------------------------


@functools.cache
def whole() -> tuple[bytes, list[RolloutGroup]]:
    """A shard as a run writes it, and what it holds."""
    kept = []
    for number in range(6):
        prompt = Prompt(f"sum/{number}", f"1+{number}=", str(number + 1), "sum", (3, 4, number))
        kept.append(RolloutGroup(prompt, tuple(_plain_rollout(number, sample) for sample in range(4))))
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "whole.parquet", 5, kept[:5], kept[5:])
        return (Path(folder) / "whole.parquet").read_bytes(), kept[:5]


def _plain_rollout(number: int, sample: int) -> Rollout:
    draw = torch.Generator().manual_seed(10 * number + sample)
    length = 3 + sample * number
    rows = [torch.rand(length, generator=draw) for _ in range(4)]
    return Rollout(
        prompt_ids=torch.tensor([3, 4, number]),
        response_ids=torch.randint(0, 50, (length,), generator=draw),
        sampler_logprobs=rows[0],
        policy_version=5,
        finish_reason="stop" if sample else "length",
        seed=100 * number + sample,
        text="so it is " * sample + str(number),
        score=Score(float(sample % 2), "correct" if sample % 2 else "wrong", {"exact_match": float(sample % 2)}),
        advantage=rows[1],
        behaviour_logprobs=rows[2],
        reference_logprobs=rows[3] if number % 2 else None,
    )


@dataclass(frozen=True)
class Damage:
    """To a whole shard; places are shares of its length."""

    cut: float | None = None
    flips: tuple[tuple[float, int], ...] = ()
    """Where, and which bit."""
    zeros: tuple[float, int] | None = None
    """From where, how many bytes."""
    shifted: tuple[float, bytes] | None = None
    """Where, and what is put in."""
    replaced: bytes | None = None
    """The whole content."""

    def done(self, content: bytes) -> bytes:
        damaged = bytearray(content)
        for place, bit in self.flips:
            damaged[int(place * (len(damaged) - 1))] ^= 1 << bit
        if self.zeros is not None:
            start = int(self.zeros[0] * len(damaged))
            damaged[start : start + self.zeros[1]] = bytes(len(damaged[start : start + self.zeros[1]]))
        if self.shifted is not None:
            start = int(self.shifted[0] * len(damaged))
            damaged[start:start] = self.shifted[1]
        if self.cut is not None:
            del damaged[int(self.cut * len(damaged)) :]
        return bytes(damaged) if self.replaced is None else self.replaced


PLACES = st.floats(0, 1) | st.floats(0.6, 1)  # the footer is at the end
FLIPS = st.lists(st.tuples(PLACES, st.integers(0, 7)), min_size=1, max_size=3).map(tuple)
FLIP = st.tuples(st.tuples(PLACES, st.integers(0, 7)))
FRAMED = st.binary(max_size=60).map(lambda inner: b"PAR1" + inner + len(inner).to_bytes(4, "little") + b"PAR1")
DAMAGES = st.one_of(
    st.builds(Damage, flips=FLIP),
    st.builds(Damage, flips=FLIPS),
    st.builds(Damage, cut=st.floats(0, 1)),
    st.builds(Damage, zeros=st.tuples(PLACES, st.integers(1, 64))),
    st.builds(Damage, shifted=st.tuples(PLACES, st.binary(min_size=1, max_size=3))),
    st.builds(Damage, replaced=st.binary(max_size=100) | FRAMED),
)


def check_damaged(tools: Tools, damage: Damage) -> Outcome:
    content, kept = whole()
    path = tools.folder / "damaged.parquet"
    path.write_bytes(damage.done(content))
    try:
        assert same(read_shard(path), kept), "what is read is what was written"
        return "accepted"
    except ValueError as error:
        refusal = error
    assert type(refusal) is ValueError, "pyarrow's own errors stay inside"
    message = str(refusal)
    assert message.startswith(f"{path}: ")
    assert len(message) <= 5_000
    assert message.isprintable()
    return "refused"


# --- the buffer ---------------------------------------------------------------------------------------------------


class BufferMachine(RuleBasedStateMachine):
    """ReplayBuffer beside a dict of names by version."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.window = 0
        self.step = 0
        self.buffer = ReplayBuffer(0)
        self.model: dict[int, list[str]] = {}

    @precondition(lambda self: self.step == 0 and not self.model)
    @rule(window=st.integers(0, 5))
    def begin(self, window: int) -> None:
        self.window, self.buffer = window, ReplayBuffer(window)

    @rule(count=st.integers(0, 4), size=st.integers(1, 3), ahead=st.sampled_from([0, 1, 1, 1, 2, 7]))
    def add(self, count: int, size: int, ahead: int) -> None:
        """`ahead` 0 is the same step once more, as after a retry; 2 and 7 are steps that sampled nothing."""
        self.step += ahead
        self.buffer.add([_named(self.step, number, size) for number in range(count)], self.step)
        self.model[self.step] = [f"{self.step}/{number}/{size}" for number in range(count)]
        self.model = {v: names for v, names in self.model.items() if self.step - v < self.window}

    @rule()
    def clear(self) -> None:
        self.buffer.clear()
        self.model = {}

    @rule(ahead=st.integers(0, 3), window=st.integers(0, 6))
    def available(self, ahead: int, window: int) -> None:
        assert self.buffer.available(self.step + ahead, window) == len(self._within(ahead, window))

    @rule(
        ahead=st.integers(0, 3),
        window=st.integers(0, 6),
        count=st.integers(0, 12),
        distribution=st.sampled_from(get_args(LagDistribution)),
        seed=st.integers(0, 2**32),
    )
    def draw(self, ahead: int, window: int, count: int, distribution: LagDistribution, seed: int) -> None:
        def drawn(buffer: ReplayBuffer) -> list[RolloutGroup]:
            rng = np.random.default_rng(seed)
            return buffer.draw(count, step=self.step + ahead, window=window, distribution=distribution, rng=rng)

        got, allowed = drawn(self.buffer), self._within(ahead, window)
        names = [group.prompt.id for group in got]
        assert set(names) <= set(allowed), "outside the window"
        assert len(set(names)) == len(names) == min(count, len(allowed))
        assert all(len(group.rollouts) == int(group.prompt.id.rpartition("/")[2]) for group in got), "not whole"
        assert [id(group) for group in drawn(self.buffer)] == [id(group) for group in got], "the seed alone decides"
        assert same(drawn(self._reloaded()), got), "a resumed run draws something else"

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert self.buffer.versions == sorted(self.model)

    def _within(self, ahead: int, window: int) -> list[str]:
        return [name for v, names in self.model.items() if 1 <= self.step + ahead - v <= window for name in names]

    def _reloaded(self) -> ReplayBuffer:
        """By way of the shards, as a resumed run does it."""
        resumed = ReplayBuffer(self.window)
        for version in self.buffer.versions:
            path = shard_path(self.folder, version)
            groups_ = [_named(version, *map(int, name.split("/")[1:])) for name in self.model[version]]
            write_shard(path, version, groups_, [_named(version, 99, 1)])
            resumed.add(read_shard(path), version)
        return resumed


def _named(version: int, number: int, size: int) -> RolloutGroup:
    prompt = Prompt(f"{version}/{number}/{size}", "1+1=", "2", "sum", (3,))
    ids, row = torch.tensor([3]), torch.tensor([-0.5, float(number)])
    return RolloutGroup(
        prompt,
        tuple(
            Rollout(ids, torch.tensor([5, 1]), row, version, "stop", sample, "x", Score(1.0, "correct"))
            for sample in range(size)
        ),
    )
