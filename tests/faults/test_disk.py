"""A full disk, and files that are no longer what was written."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.harness import ENVIRONMENT, SECONDS, assert_same_run, command, train
from tests.tiny import ROOT


@pytest.mark.parametrize(("full", "size"), [("rollouts", "8k"), ("checkpoints", "5m"), (".", "24k")])
def test_a_full_disk(unharmed: Path, tmp_path: Path, full: str, size: str) -> None:
    """A file system with room for less than the run writes there, in a mount name space of its own; then enlarged.

    Shards, checkpoints, or what lies in the run directory itself: recipe and metrics.
    """
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    small = (run_dir / full).resolve()
    small.mkdir(exist_ok=True)
    steps = [f"mount -t tmpfs -o size={size} tmpfs {small}"]
    if full == ".":  # all but the metrics elsewhere, and the disk full but for a few of their lines
        for name in ("rollouts", "checkpoints"):
            (tmp_path / name).mkdir()
            steps.append(f"ln -s {tmp_path / name} {small / name}")
        steps.append(f"dd if=/dev/zero of={small / 'filler'} bs=1k count=16 status=none")
    steps += [
        shlex.join(command(run_dir)),
        "echo status $?",
        f"mount -o remount,size=200m {small}",
        shlex.join(command(run_dir, resume=True)),
        "echo status $?",
        f"cp -rL {run_dir} {tmp_path / 'copy'}",  # the mount is gone when its name space ends
    ]
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        ["unshare", "--mount", *as_root, "sh", "-c", "\n".join(steps)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=2 * SECONDS,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == ["status 1", "status 0"]
    assert "No space left on device" in done.stderr
    assert f"go on with --resume {run_dir}" in done.stderr
    assert "Traceback" not in done.stderr
    assert_same_run(tmp_path / "copy", unharmed)


@pytest.mark.parametrize("harm", ["flipped checkpoint", "truncated checkpoint", "flipped shard", "truncated shard"])
def test_damaged_files_are_passed_over_by_name(replayed: Path, tmp_path: Path, harm: str) -> None:
    """The newest checkpoint, or a shard that it counts on: the run goes on from the one before, and is the same run."""
    run_dir = tmp_path / "run"
    shutil.copytree(replayed, run_dir, symlinks=True)
    shutil.rmtree(run_dir / "final")
    newest = run_dir / "checkpoints" / "step=000003"
    victim = newest / "tensors.safetensors" if "checkpoint" in harm else run_dir / "rollouts" / "step=000002.parquet"
    data = bytearray(victim.read_bytes())
    if "flipped" in harm:
        data[len(data) // 2] ^= 1
    else:
        del data[-100:]
    victim.write_bytes(data)
    done = train(run_dir, *REPLAYS, resume=True)
    said = " ".join(done.stdout.split())
    assert f"{newest} is passed over: {victim.name}" in said
    assert_same_run(run_dir, replayed)


REPLAYS = ("phases=[{type: mix_policy, off_policy_fraction: 0.5, window: 2}]", "checkpoint.keep=3")


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints count on rollout shards."""
    run_dir = tmp_path_factory.mktemp("replayed") / "run"
    train(run_dir, *REPLAYS)
    return run_dir
