"""Calls in processes of their own: they end with the study that began them."""

import subprocess
import sys
import time
from operator import neg
from pathlib import Path

import psutil
import pytest

from scripts.processes import in_processes


def test_each_item_comes_with_its_result() -> None:
    assert sorted(in_processes(neg, [3, 1, 2], 2)) == [(1, -1), (2, -2), (3, -3)]


def test_what_a_call_raises_is_raised() -> None:
    with pytest.raises(TypeError, match="bad operand"):
        [*in_processes(neg, ["no number"], 1)]


def test_a_killed_study_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    script.write_text(
        "import time\n"
        "from scripts.processes import in_processes\n"
        "if __name__ == '__main__':\n"
        "    [*in_processes(time.sleep, [600, 600], 2)]\n"
    )
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen([sys.executable, str(script)], env={"PYTHONPATH": str(root)}) as study:
        of_study = psutil.Process(study.pid)
        deadline = time.monotonic() + 60
        while len(workers := of_study.children(recursive=True)) < 3 and time.monotonic() < deadline:  # and the tracker
            time.sleep(0.1)
        time.sleep(2)  # so that the workers are at work
        study.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert len(workers) == 3
    assert not alive
