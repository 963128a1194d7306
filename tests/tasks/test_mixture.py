"""The mixture: names and ids that stay apart, a stream that is pure in its position, and the evaluation's choice."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest

from remix.config import ArithmeticTask, JsonlTask
from remix.tasks import PromptStream, TaskSet, eval_prompts, load_tasks, named_apart
from remix.types import Prompt


def task(name: str, size: int, weight: float = 1.0) -> TaskSet:
    return TaskSet(name, weight, tuple(Prompt(f"{name}/{i}", f"{i}", "1", name) for i in range(size)))


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_names_and_ids_stay_apart(tmp_path):
    configs = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "sums.jsonl"
        path.parent.mkdir()
        path.write_text(json.dumps({"id": 0, "problem": "1+1", "answer": "2"}) + "\n")
        configs.append(JsonlTask(path=str(path), holdout=0.0, weight=2.0))
    one, two = load_tasks(configs, "train")
    assert (one.name, one.weight, ids(list(one.prompts))) == ("sums", 2.0, ["0"])
    assert (two.name, two.weight, ids(list(two.prompts))) == ("sums_2", 2.0, ["sums_2/0"])
    assert two.prompts[0].task == "sums_2"


def test_arithmetic_trains_on_its_size_and_is_tested_on_others():
    config = ArithmeticTask(size=300)
    (train,), (test,) = load_tasks([config], "train"), load_tasks([config], "test")
    assert (len(train.prompts), len(test.prompts)) == (300, 300)
    assert not {p.content for p in train.prompts} & {p.content for p in test.prompts}
    (test,) = load_tasks([ArithmeticTask(size=5000)], "test")
    assert len(test.prompts) == 1024
    # 81 sums of two terms, about an eighth of them held out: fewer than asked for, so all.
    (test,) = load_tasks([ArithmeticTask(min_terms=2, max_terms=2, size=50)], "test")
    assert 0 < len(test.prompts) < 30


def test_two_arithmetic_tasks_may_share_problems():
    one, two = load_tasks([ArithmeticTask(size=50), ArithmeticTask(size=50)], "train")
    assert (one.name, two.name) == ("arithmetic", "arithmetic_2")
    assert not {p.id for p in one.prompts} & {p.id for p in two.prompts}


def test_tasks_without_held_out_problems_are_left_out_of_evaluation(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"id": 0, "problem": "1+1", "answer": "2"}) + "\n")
    sets = load_tasks([JsonlTask(path=str(path), holdout=0.0), ArithmeticTask(size=10)], "test")
    assert [s.name for s in sets] == ["arithmetic"]


def test_the_stream_is_pure_in_its_position():
    sets = [task("a", 7), task("b", 5, weight=0.5)]
    whole = ids(PromptStream(sets, seed=3).take(0, 200))
    stream = PromptStream(sets, seed=3)
    for position, count in [(150, 20), (0, 10), (199, 1), (30, 0), (13, 57)]:
        assert ids(stream.take(position, count)) == whole[position : position + count]
    far = ids(PromptStream(sets, seed=3).take(10_000, 10))  # resumed: nothing before was ever drawn
    assert far == ids(stream.take(9_995, 15))[5:]


def test_seeds_differ():
    sets = [task("a", 50), task("b", 50)]
    assert ids(PromptStream(sets, seed=0).take(0, 50)) != ids(PromptStream(sets, seed=1).take(0, 50))


def test_every_epoch_holds_each_prompt_once_in_a_new_order():
    drawn = ids(PromptStream([task("a", 10)], seed=0).take(0, 30))
    epochs = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(epoch) == [f"a/{i}" for i in range(10)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_weights_hold_at_all_times():
    sets = [task("a", 30, weight=1), task("b", 11, weight=2), task("c", 1000, weight=7)]
    counts: Counter[str] = Counter()
    for draws, prompt in enumerate(PromptStream(sets, seed=5).take(0, 5000), 1):
        counts[prompt.task] += 1
        for name, share in (("a", 0.1), ("b", 0.2), ("c", 0.7)):
            assert abs(counts[name] - share * draws) < 5
    # And each task walks its own epochs: 500 draws of "a" are 16 whole ones and 20 more.
    seen = Counter(p.id for p in PromptStream(sets, seed=5).take(0, 5000) if p.task == "a")
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_task_of_almost_no_weight():
    drawn = PromptStream([task("a", 3), task("b", 3, weight=1e-30)], seed=0).take(0, 100)
    assert {prompt.task for prompt in drawn} == {"a"}


def test_streams_of_real_size_are_fast():
    stream = PromptStream([task("a", 40_000), task("b", 7_000, weight=0.3)], seed=0)
    began = time.perf_counter()
    for step in range(2000):
        stream.take(step * 128, 128)
    assert time.perf_counter() - began < 10  # measured: under 1 s


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="at least one task"):
        PromptStream([], seed=0)
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([task("a", 0)], seed=0)


def test_evaluation_is_a_fixed_share_of_each_task():
    sets = [task("a", 100), task("b", 100, weight=3)]
    chosen = eval_prompts(sets, 40, seed=0)
    assert Counter(p.task for p in chosen) == {"a": 10, "b": 30}
    assert ids(chosen) == ids(eval_prompts(sets, 40, seed=0))
    assert ids(chosen) != ids(eval_prompts(sets, 40, seed=1))
    assert set(ids(chosen)) < set(ids(eval_prompts(sets, 41, seed=0)))


def test_a_task_too_small_for_its_share_leaves_it_to_the_others():
    sets = [task("a", 4), task("b", 100)]
    assert Counter(p.task for p in eval_prompts(sets, 40, seed=0)) == {"a": 4, "b": 36}
    assert len(eval_prompts(sets, 1000, seed=0)) == 104


def test_a_prompt_drawn_twice_in_a_step_is_named_apart():
    one, two = Prompt("a", "1+1=", "2", "t"), Prompt("b", "1+2=", "3", "t")
    assert [p.id for p in named_apart([one, two, one, one], [])] == ["a", "b", "a#2", "a#3"]
    assert [p.id for p in named_apart([two, one], ["a", "a"])] == ["b", "a#3"]
