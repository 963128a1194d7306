"""Numbers that are none, and clocks that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from tests.faults.harness import STEPS, assert_same_run, metrics, train


def test_updates_with_nan_gradients_are_skipped_and_counted(tmp_path: Path) -> None:
    """Two minibatches a step: updates 2 and 3 are the second of step 0 and the first of step 1."""
    train(tmp_path / "run", "faults.skipped_updates=2", plant=["nan_gradients=2,3"])
    lines = metrics(tmp_path / "run")
    assert [line["updates/skipped"] for line in lines] == [1, 1, 0]
    assert [line["updates"] for line in lines] == [1, 1, 2]
    assert all(value == value for line in lines for value in line.values())
    dumps = sorted(path.name for path in (tmp_path / "run" / "skipped").iterdir())
    assert dumps == ["step=000000-update=002.safetensors", "step=000001-update=001.safetensors"]


def test_too_many_in_a_row_end_the_run_with_the_batch_on_disk(tmp_path: Path) -> None:
    """The count goes on from step to step, also where the run is resumed in between."""
    run_dir = tmp_path / "run"
    train(run_dir, "faults.skipped_updates=2", "max_steps=1", plant=["nan_gradients=2"])
    done = train(run_dir, "faults.skipped_updates=2", plant=["nan_gradients=1,2"], resume=True, status=1)
    assert "step 1: grad_norm/policy is not finite in 3 updates in a row" in done.stderr
    dump = run_dir / "skipped" / "step=000001-update=002.safetensors"
    assert str(dump) in done.stderr
    batch = load_file(dump)
    assert batch["batch.input_ids"].shape[0] == batch["batch.seed"].shape[0] == batch["batch.policy_lag"].shape[0] > 0
    assert batch["batch.response_mask"].any()
    # Without the fault, the run goes on from its last checkpoint.
    train(run_dir, resume=True)
    assert [line["step"] for line in metrics(run_dir)] == list(range(STEPS))


def test_a_clock_that_jumps_changes_nothing(unharmed: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", plant=["jumping_clock"])
    assert_same_run(tmp_path / "run", unharmed)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    times = [value for line in lines for key, value in line.items() if key.startswith("time/")]
    assert times
    assert all(0 <= seconds < 1000 for seconds in times), "an hour is what the clock jumps by"
