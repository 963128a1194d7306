"""Deadlines and lost workers, with real processes: whatever happens to one answer, the others are graded."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from remix.rewards import GraderPool
from remix.rewards.workers import _Worker
from tests.rewards.processes import children

HALF = r"\frac{1}{2}"
RIGHT, WRONG = r"\boxed{\frac{\sqrt{4}}{4}}", r"\boxed{\frac{\sqrt{4}}{3}}"  # both take mathematics, and so a worker
BOMB = r"\boxed{\sum_{k=1}^{10^9} \sin(k^k)}"  # for computer algebra, which does not come back


def verdicts(pool: GraderPool, *responses: str, gold: str = HALF) -> list[str]:
    return [found.verdict for found in pool.grade([(gold,)] * len(responses), responses)]


def test_grades_in_order_and_keeps_its_workers():
    before = children()
    with GraderPool(workers=2, timeout=30) as pool:
        responses = [RIGHT, WRONG, "", RIGHT, r"\boxed{5}", "no idea"] * 4
        expected = ["correct", "wrong", "no_answer", "correct", "wrong", "no_answer"] * 4
        assert verdicts(pool, *responses) == expected
        started = children() - before
        assert len(started) == 2
        assert verdicts(pool, *responses) == expected
        assert children() - before == started
    assert children() == before


def test_what_text_decides_starts_no_process():
    before = children()
    with GraderPool() as pool:
        assert verdicts(pool, r"\boxed{5}", r"\boxed{6}", "", gold="5") == ["correct", "wrong", "no_answer"]
        assert children() == before


def test_bombs_end_at_the_deadline_and_the_others_are_graded():
    with GraderPool(workers=2, timeout=1.5) as pool:
        verdicts(pool, RIGHT, RIGHT)  # both are up, so that only grading is timed
        began = time.monotonic()
        found = verdicts(pool, RIGHT, BOMB, WRONG, r"\boxed{\prod_{k=1}^{10^{7}} (k!)!}", RIGHT)
        assert time.monotonic() - began < 20
        assert [found[0], found[2], found[4]] == ["correct", "wrong", "correct"]
        assert found[1] in ("timeout", "error")  # which of time and memory ends it depends on the machine
        assert found[3] in ("timeout", "error")
        assert verdicts(pool, RIGHT, WRONG) == ["correct", "wrong"]


def test_a_soak_of_five_thousand_loses_none():
    kinds = [
        (RIGHT, {"correct"}),
        (WRONG, {"wrong"}),
        (r"\boxed{0.5}", {"correct"}),
        ("The answer is 1/2.", {"correct"}),
        ("no idea", {"no_answer"}),
        ("<think>" + RIGHT, {"no_answer"}),
        (r"\boxed{9^{9^{9^{9}}}}", {"wrong"}),
        (r"\boxed{" + r"\sqrt{" * 300 + "}" * 301, {"wrong"}),
        ("{" * 2000, {"no_answer", "wrong"}),
        (r"\boxed{x^2 + \sin y}", {"wrong"}),
        (r"\boxed{" + "7" * 1990 + "}", {"wrong"}),
        (r"\boxed{\frac{1}{2}, \frac{1}{2} + 10^{-40}}", {"wrong"}),
    ]
    soak = [kinds[number % len(kinds)] for number in range(5_000)]
    for number in range(400, 5_000, 800):
        soak[number] = (BOMB, {"timeout", "error"})
    with GraderPool(workers=2, timeout=1) as pool:
        found = verdicts(pool, *[response for response, _ in soak])
    assert len(found) == 5_000
    assert [(number, verdict) for number, verdict in enumerate(found) if verdict not in soak[number][1]] == []


def test_tolerance_reaches_the_workers():
    with GraderPool(workers=1, timeout=30) as pool:
        pair = [("3.14",)], [r"\boxed{3.141}"]
        assert [pool.grade(*pair)[0].verdict, pool.grade(*pair, tolerance=0.01)[0].verdict] == ["wrong", "correct"]


def test_a_worker_killed_from_outside_costs_its_own_answer_only(monkeypatch):
    before = children()
    killed = []

    def send_and_kill(self, task, request):
        """As the system's memory killer would: SIGKILL while the worker is at the second answer."""
        send(self, task, request)
        if task == 1:
            self._exchange()
            (victim,) = children() - before
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    send = _Worker.send
    with GraderPool(workers=1, timeout=30) as pool:
        verdicts(pool, RIGHT)
        monkeypatch.setattr(_Worker, "send", send_and_kill)
        assert verdicts(pool, RIGHT, BOMB, WRONG, RIGHT) == ["correct", "error", "wrong", "correct"]
        assert len(killed) == 1
        assert not children() & set(killed)


def test_a_worker_lost_between_calls_costs_nothing():
    before = children()
    with GraderPool(workers=1, timeout=30) as pool:
        verdicts(pool, RIGHT)
        (victim,) = children() - before
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
        assert verdicts(pool, RIGHT) == ["correct"]


def test_a_stopped_worker_does_not_hang_the_caller():
    before = children()
    with GraderPool(workers=1, timeout=1) as pool:
        verdicts(pool, RIGHT)
        (victim,) = children() - before
        os.kill(victim, signal.SIGSTOP)
        golds = ["y" * 100_000 + str(i) for i in range(3)]  # more than a pipe holds
        assert pool.grade([(*golds, HALF)], [RIGHT])[0].verdict == "timeout"
        assert pool.grade([(*golds, HALF)], [RIGHT])[0].verdict == "correct"


def test_workers_are_under_their_limits():
    before = children()
    with GraderPool(workers=1, timeout=30, memory=500 * 1024**2) as pool:
        verdicts(pool, RIGHT)
        (worker,) = children() - before
        with open(f"/proc/{worker}/limits") as limits:
            soft = {line[:26].strip(): line[26:].split()[0] for line in limits}
        assert soft["Max address space"] == str(500 * 1024**2)
        assert soft["Max core file size"] == "0"
        assert 31 <= int(soft["Max cpu time"]) <= 40  # 31 s beyond what it has used: nobody else ends an orphan


def test_from_threads():
    results: dict[int, list[str]] = {}
    with GraderPool(workers=2, timeout=30) as pool:

        def work(number: int) -> None:
            results[number] = verdicts(pool, *[RIGHT, WRONG][:: 1 if number % 2 else -1])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {n: ["correct", "wrong"] if n % 2 else ["wrong", "correct"] for n in range(6)}


def test_after_a_failure_no_stale_reply_is_read(monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = children()
    with GraderPool(workers=1, timeout=30) as pool:
        verdicts(pool, RIGHT)
        monkeypatch.setattr(_Worker, "attend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            verdicts(pool, WRONG)
        monkeypatch.undo()
        assert children() == before
        assert verdicts(pool, RIGHT) == ["correct"]


def test_a_worker_that_cannot_start_is_said():
    # Less address space than the interpreter needs, so the warm-up before "ready" fails.
    with (
        GraderPool(workers=1, memory=1024**2) as pool,
        pytest.raises(RuntimeError, match=r"did not start.*math_worker"),
    ):
        verdicts(pool, RIGHT)


def test_many_open_files():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("the system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1050)]  # beyond what select() can watch
    try:
        with GraderPool(workers=1, timeout=30) as pool:
            assert verdicts(pool, RIGHT) == ["correct"]
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
