"""Reward functions that hang, die, raise or talk, in real processes: what goes wrong with one response stays there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import remix.rewards.python
from remix.config import PythonReward
from remix.rewards import RewardSuite
from remix.types import Prompt, Score
from tests.rewards.processes import children, eventually, gone

MODULE = r'''
import os, re, signal, subprocess, sys, time
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).parent

class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no")

def odd(prompt, response):
    """Does what the response says."""
    if response == "hang":
        (HERE / "pid").write_text(str(os.getpid()))
        time.sleep(1e6)
    if response == "spin":  # never gives up the interpreter's lock
        (HERE / "pid").write_text(str(os.getpid()))
        re.fullmatch("(a|aa)+b", "a" * 500)
    if response == "wait for a child":
        child = subprocess.Popen(["sleep", "100000"])
        (HERE / "child").write_text(str(child.pid))
        child.wait()
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "exit":
        os._exit(3)
    if response == "die with a child":
        if child := os.fork():
            (HERE / "child").write_text(str(child))
            os._exit(4)
        time.sleep(1e6)
    if response == "double":
        os.fork()
    if response == "raise":
        raise KeyError("x")
    if response == "raise much":
        raise ValueError("\ud800\n\x1b[31m" + "y" * 10**6)
    if response == "raise the unspeakable":
        raise Unspeakable
    if response == "sys.exit":
        sys.exit(1)
    if response == "read":
        return len(input())
    if response == "print":
        print('["not a reply", ""]\n', response * 10_000, "\ud800", flush=True)
        sys.stdout.buffer.write(b"\xff\xfe\n")
        os.write(1, b"[3.0, \"\"]\n\xff\xff")
    values = {"nothing": None, "nan": float("nan"), "infinite": float("inf"), "text": "1.0", "vast": Fraction(10**400)}
    return values.get(response, 1.0)

def length(prompt, response):
    return len(response)

def same(prompt, response):
    return response == "a\nb\r\n\0\ud83d\u2028\udc00" and [prompt.content, prompt.images, prompt.token_ids] == [
        ({"role": "user", "content": "3\n\ud800"},), ("a.png",), (1, 2)
    ]

def process(prompt, response):
    return os.getpid()

def mortal(prompt, response):
    if response == "die":
        (HERE / "broken").touch()
        os._exit(1)
    return 1.0

if (HERE / "broken").exists():
    raise RuntimeError("broken by now")

constant = 3
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the module `odd_rewards` lies."""
    (tmp_path / "odd_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def suite(function: str = "odd", timeout: float = 60.0, workers: int = 1) -> RewardSuite:
    return RewardSuite([PythonReward(function=f"odd_rewards:{function}", timeout=timeout, workers=workers)])


def score(rewards: RewardSuite, *responses: str) -> list[Score]:
    return rewards.score([Prompt("p7", "3+8=", "11", "sums")] * len(responses), responses, [1] * len(responses))


def test_each_failure_costs_its_own_response_only():
    said = {
        "raise": "odd_rewards:odd raised KeyError ('x') on prompt 'p7'; let it return a value for any text",
        "raise the unspeakable": "raised Unspeakable (a Unspeakable that cannot be written out) on prompt 'p7'",
        "sys.exit": "raised SystemExit (1)",
        "read": "raised EOFError (EOF when reading a line)",
        "nothing": "odd_rewards:odd returned None on prompt 'p7'; it has to return a finite number",
        "nan": "returned nan",
        "infinite": "returned inf",
        "text": "returned '1.0'",
        "vast": "returned Fraction(1000",
        "kill": "odd_rewards:odd did not score prompt 'p7': its process died (signal 9: Killed)",
        "exit": "its process died (exit code 3)",
    }
    responses = [text for bad in said for text in (bad, "fine")]
    with suite(workers=2) as rewards:
        found = score(rewards, *responses)
    assert [(s.verdict, s.value, s.note) for s in found[1::2]] == [("correct", 1.0, "")] * len(said)
    assert [(s.verdict, s.value, s.failed) for s in found[::2]] == [("error", 0.0, True)] * len(said)
    for wanted, failed in zip(said.values(), found[::2], strict=True):
        assert wanted in failed.note
        assert len(failed.note) < 600


def test_a_note_is_one_short_line_that_can_be_written_anywhere():
    with suite() as rewards:
        (found,) = score(rewards, "raise much")
    assert "raised ValueError ( yyyy" in found.note
    assert found.note.isprintable()
    assert len(found.note.encode()) < 600


def test_what_raises_keeps_its_process():
    before = children()
    with suite() as rewards:
        started = children() - before
        assert len(started) == 1, "workers are up before the first response"
        score(rewards, "raise", "nan", "sys.exit")
        assert children() - before == started
    assert children() == before


def test_hanging_functions_end_at_the_deadline(folder: Path):
    with suite(timeout=3, workers=2) as rewards:
        began = time.monotonic()
        found = score(rewards, "fine", "hang", "spin", "wait for a child", "fine")
        assert 3 < time.monotonic() - began < 30
    assert [s.verdict for s in found] == ["correct", "timeout", "timeout", "timeout", "correct"]
    for failed in found[1:4]:
        assert failed.note == "the reward function odd_rewards:odd did not score prompt 'p7': no reply within 3 s"
    child = int((folder / "child").read_text())
    assert eventually(lambda: gone(child)), "what the function started goes with it"


def test_a_child_that_holds_the_pipes_does_not_hide_a_death(folder: Path):
    with suite() as rewards:
        began = time.monotonic()
        assert [s.verdict for s in score(rewards, "die with a child", "fine")] == ["error", "correct"]
        assert time.monotonic() - began < 30
    child = int((folder / "child").read_text())
    assert eventually(lambda: gone(child))


def test_a_function_that_returns_twice_is_heard_once():
    with suite() as rewards:
        found = score(rewards, "double", "nan", "double", "fine")
        assert [s.verdict for s in found] == ["correct", "error", "correct", "correct"]


def test_prints_do_not_disturb(capfd: pytest.CaptureFixture[str]):
    with suite() as rewards:
        assert [s.verdict for s in score(rewards, "print", "nan", "print")] == ["correct", "error", "correct"]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("not a reply") == 2


def test_any_text_arrives_whole():
    texts = ["x" * 20_000_000, "", "\ud800" * 1_000, "\n\n", "\0"]
    with suite("length") as rewards:
        assert [s.value for s in score(rewards, *texts)] == [20_000_000, 0, 1_000, 2, 1]
    prompt = Prompt("p", ({"role": "user", "content": "3\n\ud800"},), "a", "t", (1, 2), ("a.png",))
    with suite("same") as rewards:
        assert rewards.score([prompt], ["a\nb\r\n\0\ud83d\u2028\udc00"], [1])[0].value == 1


def test_workers_killed_from_outside(folder: Path):
    before = children()

    def kill_when_busy() -> None:
        assert eventually((folder / "pid").exists)
        assert eventually(lambda: (folder / "pid").read_text() != "")
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)

    with suite() as rewards:
        (idle,) = children() - before
        os.kill(idle, signal.SIGKILL)
        assert eventually(lambda: gone(idle))
        assert score(rewards, "fine")[0].verdict == "correct"
        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        assert [s.verdict for s in score(rewards, "fine", "hang", "fine")] == ["correct", "error", "correct"]
        killer.join()


def test_a_worker_that_cannot_be_replaced_is_no_end_of_the_run(folder: Path):
    with suite("mortal") as rewards:
        found = score(rewards, "fine", "die", "fine", "fine")
        assert [s.verdict for s in found] == ["correct", "error", "error", "error"]
        assert "its process died (exit code 1)" in found[1].note
        assert "importing 'odd_rewards' raised RuntimeError (broken by now) in " in found[3].note
        assert [s.verdict for s in score(rewards, "fine", "fine")] == ["error", "error"]
        (folder / "broken").unlink()
        assert [s.verdict for s in score(rewards, "fine", "fine")] == ["correct", "correct"]


def test_a_worker_outlives_the_thread_that_asked_for_it():
    found: list[Score] = []
    with suite("process") as rewards:
        (first,) = score(rewards, "x")
        os.kill(int(first.value), signal.SIGKILL)
        assert eventually(lambda: gone(int(first.value)))
        thread = threading.Thread(target=lambda: found.extend(score(rewards, "x")))  # starts a new worker
        thread.start()
        thread.join()
        time.sleep(0.2)
        assert [first.value] != [s.value for s in found] == [s.value for s in score(rewards, "x")]


def test_threads_get_their_own_replies():
    found: dict[int, set[float]] = {}
    with suite("length", workers=2) as rewards:

        def work(number: int) -> None:
            found[number] = {s.value for s in score(rewards, *["x" * number] * 100)}

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: {number} for number in range(4)}


def run_script(body: str, **kwargs: object) -> subprocess.Popen[bytes]:
    """A trainer's part, as a process of its own."""
    head = f"""
        import os, sys
        sys.path[:0] = {sys.path!r}
        from remix.config import PythonReward
        from remix.rewards import GraderPool
        from remix.rewards.python import Python
        from remix.types import Prompt

        def score(reward, response="x"):
            return reward.score([Prompt("p", "c", "1/2", "t")], [response], [1])[0].value
        """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body)], **kwargs)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("response", ["hang", "spin"])
def test_no_worker_outlives_a_trainer_that_is_killed(folder: Path, response: str):
    trainer = run_script(f"""
        score(Python(PythonReward(function="odd_rewards:odd", timeout=3600)), {response!r})
        """)
    try:
        assert eventually(lambda: (folder / "pid").exists() and (folder / "pid").read_text() != "", 60)
        worker = int((folder / "pid").read_text())
        assert worker in children(trainer.pid)
    finally:
        trainer.kill()
        trainer.wait()
    assert eventually(lambda: gone(worker), 10)


def test_no_grader_outlives_a_trainer_that_is_killed():
    trainer = run_script(
        r"""
        pool = GraderPool(workers=1, timeout=3600)
        pool.grade([("1/2",)], [r"\boxed{\frac{\sqrt{4}}{4}}"])
        print("graded", flush=True)
        pool.grade([("1/2",)], [r"\boxed{\sum_{k=1}^{10^9} \sin(k^k)}"])
        """,
        stdout=subprocess.PIPE,
    )
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"graded\n"
        (worker,) = children(trainer.pid)
        time.sleep(0.5)  # it is at the sum
    finally:
        trainer.kill()
        trainer.wait()
    assert eventually(lambda: gone(worker), 10)


def test_a_fork_has_workers_of_its_own():
    trainer = run_script("""
        reward = Python(PythonReward(function="odd_rewards:process"))
        before = score(reward)
        if (child := os.fork()) == 0:
            other = score(reward)
            reward.close()
            os._exit(7 if other != before else 8)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.exit(status if score(reward) == before else 9)
        """)
    assert trainer.wait(60) == 7


def test_an_interpreter_ends_though_nobody_closed_the_reward():
    trainer = run_script(
        """
        reward = Python(PythonReward(function="odd_rewards:process"))
        print(int(score(reward)))
        """,
        stdout=subprocess.PIPE,
    )
    worker = int(trainer.communicate(timeout=60)[0])
    assert trainer.returncode == 0
    assert eventually(lambda: gone(worker), 10)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("odd_rewards", "the reward function 'odd_rewards' is not of the form module:function"),
        ("odd_reward:odd", "there is no module 'odd_reward'; put its folder on PYTHONPATH"),
        ("odd_rewards.part:odd", "there is no module 'odd_rewards.part'"),
        ("odd_rewards:od", "module 'odd_rewards' has no 'od'; did you mean 'odd'"),
        ("odd_rewards:constant", "is a int, which cannot be called"),
        (
            "half_installed:f",
            r"importing 'half_installed' raised ModuleNotFoundError \(No module named 'nowhere'\) in ",
        ),
        (
            "script:f",
            r"importing 'script' raised SystemExit \(2\) in .*script.py, line 1; `.* -c 'import script'` shows",
        ),
        ("deadly:f", r"the process of the reward function 'deadly:f' did not start \(exit code 5\); see above, or run"),
        ("__main__:f", r"cannot import the script that was started; name the script's file, such as my_script:f"),
    ],
)
def test_loading_errors_come_before_anything_is_scored(folder: Path, function: str, message: str):
    (folder / "half_installed.py").write_text("import nowhere\n")
    (folder / "script.py").write_text("raise SystemExit(2)\n")
    (folder / "deadly.py").write_text("import os; os._exit(5)\n")
    before = children()
    with pytest.raises(ValueError, match=message):
        RewardSuite([PythonReward(function=function)])
    assert children() == before


def test_a_module_that_is_never_imported_to_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "endless.py").write_text("while True: pass\n")
    monkeypatch.setattr(remix.rewards.python, "START_SECONDS", 1.0)
    with pytest.raises(ValueError, match=r"reward function 'endless:f' did not start within 1.5 s; see above, or run"):
        RewardSuite([PythonReward(function="endless:f", timeout=1.5)])


def test_modules_are_found_as_the_trainer_finds_them(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """In the working directory too, where that is on the path; and what else lies there disturbs no worker."""
    here = folder / "here"
    here.mkdir()
    for name in ("remix", "signal"):
        (here / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    (here / "local_rewards.py").write_text("import remix.types\ndef two(prompt, response): return 2\n")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with RewardSuite([PythonReward(function="local_rewards:two")]) as rewards:
        assert score(rewards, "x")[0].value == 2


def test_workers_do_without_torch():
    code = "import sys, remix.rewards.python_worker, remix.rewards.math_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
