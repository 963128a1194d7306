"""The next step sampled while this one updates: the same run as if it were sampled before, token for token."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from remix.config import Recipe, parse_recipe
from remix.errors import Interrupted
from remix.replay import read_shard, shard_path
from remix.rollout import process
from remix.rollout.process import EngineProcess
from remix.tasks import named_apart
from remix.tracking.stopwatch import Stopwatch
from remix.training.beside import Beside
from remix.training.plan import make_plan
from remix.types import Prompt, RolloutGroup, Sampling
from tests.tiny import MIX, opened, tiny_recipe, weights_of
from tests.training.test_degenerate import metrics_of

PHASES = [{**MIX[0], "until": [{"type": "steps", "after": 3}]}, {"type": "on_policy"}]
KL = {"weight": 0.1, "lambda_schedule": {"start": 0.9, "hold": 1, "every": 1, "drop": 0.2}}
STEPS, REINCARNATED = 5, 3
ENGINE = {"type": "vllm", "own_process": True, "kv_cache_gib": 0.06}
SILENT = Stopwatch(lambda _: None)


def overlapping(model: Path, run_dir: Path, **changes: Any) -> Recipe:
    shared = {"steps": STEPS, "phases": PHASES, "kl": KL, "rollout": {"engine": ENGINE, "overlap": True}}
    return tiny_recipe(model, run_dir, {**shared, **changes})


class Kept(EngineProcess):
    """It outlives the runs that it samples for, since each start takes seconds."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def whole(vllm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """A run without interruption, and its weights. All runs of this module have the same engine."""
    kept: list[Kept] = []

    def engine(*arguments: Any, **options: Any) -> Kept:
        kept.extend([] if kept else [Kept(*arguments, **options)])
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "EngineProcess", engine)
        run_dir = tmp_path_factory.mktemp("overlap") / "run"
        with opened(overlapping(vllm_model, run_dir)) as t:
            t.fit()
            weights = weights_of(t)
        yield run_dir, weights
    EngineProcess.close(kept[0])


def assert_same_run(run_dir: Path, weights: dict[str, torch.Tensor], whole: tuple[Path, Any]) -> None:
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole[1].items())
    assert metrics_of(run_dir) == metrics_of(whole[0])
    for step in range(STEPS):
        assert shard_path(run_dir, step).read_bytes() == shard_path(whole[0], step).read_bytes()


def test_fresh_rollouts_are_one_policy_old_but_for_those_of_a_phases_first_step(whole: tuple[Path, Any]) -> None:
    lines = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    lags = [{int(name.partition("=")[2]) for name in line if name.startswith("tokens/lag=")} for line in lines]
    # Replay holds step 0, and then step 1 too, both sampled by policy 0.
    assert lags == [{0}, {1}, {1, 2}, {0}, {1}]
    versions = [{g.policy_version for g in read_shard(shard_path(whole[0], step))} for step in range(STEPS)]
    assert versions == [{0}, {0}, {1}, {3}, {3}]
    for line in lines:
        assert line["sampler/mismatch_max"] < 1e-3  # of the engine and the policy that it sampled for
    assert lines[1]["ratio/mean"] != pytest.approx(1.0, abs=1e-6)
    ahead = [line["step"] for line in lines if "time/ahead" in line]
    assert ahead == [0, 1, 3]
    assert all(0 < lines[step]["time/ahead_hidden"] <= 1 for step in ahead)
    assert all(lines[step]["time/ahead"] > 0 for step in ahead)


def test_it_is_the_run_that_samples_the_next_step_before_each_update(
    vllm_model: Path, tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    with opened(overlapping(vllm_model, tmp_path)) as t:
        t._sync(SILENT)
        position, ahead = 0, None
        for step in range(STEPS):
            t._enter_phase(step, SILENT)
            if ahead is None:
                ahead = by_hand(t, position, 6, step=step, version=step)
                position += 6
            fresh, truth = ahead
            replayed = t._draw(t._phase, step, len(fresh))
            ahead = None
            if step + 1 not in (REINCARNATED, STEPS):
                taken = 6 if step > REINCARNATED - 1 else 6 - min(3, t.replay.available(step + 1, 2) + len(fresh))
                ahead = by_hand(t, position, taken, step=step + 1, version=step)
                position += taken
            t.policy.begin_step(keep_precedent=True)
            kl_lambda = t.state.phase.lambda_at(step, t.recipe.kl.lambda_schedule)
            since = max(t.state.phase.reincarnations, default=0)
            fresh, samples = t.experience.prepare(
                fresh, replayed, step=step, kl_lambda=kl_lambda, reference_since=since
            )
            known = torch.cat([r.behaviour_logprobs for group in fresh for r in group.rollouts])
            torch.testing.assert_close(known, truth, atol=1e-5, rtol=0)
            if step < REINCARNATED:
                t.replay.add(fresh, step)
            t.updater.run(samples, step=step, passes=t._phase.utd_ratio, kl_lambda=kl_lambda)
            t._sync(SILENT)
            t.state.step = step + 1
            t.state.phase.record({})
            for mine, theirs in zip(fresh, read_shard(shard_path(whole[0], step)), strict=True):
                for one, other in zip(mine.rollouts, theirs.rollouts, strict=True):
                    assert one.response_ids.tolist() == other.response_ids.tolist()
                    assert one.behaviour_logprobs.tolist() == other.behaviour_logprobs.tolist()
                    assert (one.seed, one.policy_version) == (other.seed, other.policy_version)
        assert all(torch.equal(tensor, whole[1][name]) for name, tensor in weights_of(t).items())


def by_hand(t: Any, position: int, count: int, *, step: int, version: int) -> tuple[list[RolloutGroup], torch.Tensor]:
    """Groups to train on, and what the policy that samples them says of their tokens."""
    prompts: list[Prompt] = named_apart(t.stream.take(position, count), [])
    groups = t.sampler.sample(prompts, Sampling(24), 4, version=version, step=step)
    groups = [group for group in groups if not group.uniform]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return groups, torch.cat([score.logprobs for score in t.policy.score(rollouts, tokens_per_microbatch=4096)])


def hung_beside(t: Any, step: int, after: Callable[[], None]) -> None:
    """The engine hangs from before it is asked for what comes beside `step`; `after`: when that has updated."""
    run, beside = t.updater.run, t._beside

    def stopped(phase: Any, number: int, *more: Any) -> Any:
        if number == step:
            os.kill(t.sampler.engine._child._process.pid, signal.SIGSTOP)
        return beside(phase, number, *more)

    def update(*arguments: Any, **options: Any) -> Any:
        found = run(*arguments, **options)
        if options["step"] == step:
            after()
        return found

    t._beside, t.updater.run = stopped, update


def test_interrupted_while_it_waits_and_gone_on_with_it_is_the_same_run(
    vllm_model: Path, tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    """The engine hangs when the signal comes, so that the update is done and the sampling beside it is not. Later it
    is killed when the policy has moved on: what takes its place has the weights of before."""

    with opened(overlapping(vllm_model, tmp_path)) as t:
        hung_beside(t, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        started = time.monotonic()
        with t.interruption, pytest.raises(Interrupted):
            t.fit()
        assert t.state.step == 2
        assert t.state.unlogged is not None
        assert t.sampler.engine._child is None
        assert t.sampler.engine.restarts == 0
    assert [line["step"] for line in metrics_of(tmp_path)] == [0]
    assert time.monotonic() - started < 300
    with opened(overlapping(vllm_model, tmp_path), resume=True) as t:
        messages: list[str] = []
        t.sampler.engine._message = messages.append
        hung_beside(t, 3, lambda: os.kill(t.sampler.engine._child._process.pid, signal.SIGKILL))
        t.fit()
        weights = weights_of(t)
        assert len(messages) == t.sampler.engine.restarts == 1
    assert_same_run(tmp_path, weights, whole)


def test_what_fails_in_the_thread_fails_the_run(vllm_model: Path, tmp_path: Path, whole: tuple[Path, Any]) -> None:
    with opened(overlapping(vllm_model, tmp_path)) as t:
        score, main = t.sampler.rewards.score, threading.current_thread()

        def fail(*arguments: Any) -> Any:
            if threading.current_thread() is main:
                return score(*arguments)
            raise OSError("no room for the reward")

        t.sampler.rewards.score = fail
        with pytest.raises(OSError, match="no room for the reward"):
            t.fit()
        assert t.state.step == 1
        assert not list((tmp_path / "checkpoints").glob("step=*"))


def test_an_update_that_fails_ends_the_sampling_beside_it(
    vllm_model: Path, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    def fail() -> None:
        raise ValueError("the update")

    with opened(overlapping(vllm_model, tmp_path)) as t:
        hung_beside(t, 0, fail)
        with pytest.raises(ValueError, match="the update"):
            t.fit()
        assert t.sampler.engine._child is None
        assert not any(thread.name == "beside-the-trainer" for thread in threading.enumerate())


# --- without an engine ---


def test_a_call_beside() -> None:
    asked = threading.Event()

    def work() -> int:
        assert asked.wait(10)
        return 3

    with Beside(work, lambda: pytest.fail("it is wanted")) as beside:
        asked.set()
        assert beside.result() == 3
        assert 0 < beside.metrics()["time/ahead_hidden"] <= 1
    with pytest.raises(ZeroDivisionError), Beside(lambda: 1 // 0, asked.clear) as failing:
        failing.result()
    assert asked.is_set()
    asked.clear()
    with pytest.raises(KeyError), Beside(work, asked.set):
        raise KeyError
    assert asked.is_set()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"engine": {"type": "hf"}}}, "an engine of type hf in the trainer's process cannot sample while"),
        ({"rollout": {"engine": {"type": "vllm"}}}, "set rollout.engine to {type: vllm, own_process: true} or"),
        ({"objective": {"type": "sft"}, "rollout": {"group_size": 1}, "phases": [{"type": "on_policy"}],
          "kl": {"weight": 0}}, "rollout.overlap: objective.type sft samples nothing: set it to false"),
        ({"phases": [{**MIX[0], "until": [{"type": "kl_budget", "nats": 1.0}]}, {"type": "on_policy"}]},
         "phases.0: whether a kl_budget ends the phase shows after the update"),
        ({"kl": {**KL, "place": "reward"}}, "kl.place reward measures the policy that sampled against the one before"),
    ],
)  # fmt: skip
def test_refused(tiny_model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    overlapping(tiny_model, tmp_path)
    changes["rollout"] = {"engine": ENGINE, "overlap": True, **changes.get("rollout", {})}
    with pytest.raises(ValueError, match=re.escape(said)):
        overlapping(tiny_model, tmp_path, **changes)


def test_the_plan_says_what_it_does(tiny_model: Path, tmp_path: Path) -> None:
    recipe = overlapping(tiny_model, tmp_path, kl={"weight": 0})
    plan = make_plan(recipe)
    assert any("policy_lag 1" in note and "longer of the two" in note for note in plan.notes)
    assert [phase.anchor_forwards.precedent for phase in plan.phases] == [12, 24]
    assert {item.name for item in plan.memory.items} >= {"precedent snapshots", "weights as vLLM was handed them"}
    plain = recipe.model_dump(mode="json")
    plain["rollout"]["overlap"] = False
    before = make_plan(parse_recipe(plain))
    assert not any("overlap" in note for note in before.notes)
    assert [phase.anchor_forwards.precedent for phase in before.phases] == [0, 0]
