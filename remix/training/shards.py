"""The rollout log of a run with several processes: each writes its part of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from remix.durable import sha256
from remix.replay import shard_path, shard_step, write_shard
from remix.training.batching import cost
from remix.training.distributed import Cluster, balanced
from remix.types import RolloutGroup


class Shards:
    """Writes this process's shards, and knows what a checkpoint has to count on."""

    def __init__(self, run_dir: Path, cluster: Cluster, files: Mapping[str, str]) -> None:
        """`files`: shards of the checkpoint that the run goes on from, with their SHA-256."""
        self.run_dir = run_dir
        self.cluster = cluster
        self._files = dict(files)
        """Those of the checkpoint, and this process's own."""

    def write(self, step: int, kept: Sequence[RolloutGroup], dropped: Sequence[RolloutGroup]) -> None:
        """This process's part of what all of them hold: groups of about as many tokens as the others'."""
        rank, world_size = self.cluster.rank, self.cluster.world_size
        path = shard_path(self.run_dir, step, rank, world_size)
        costs = [cost(group.rollouts) for group in (*kept, *dropped)]
        write_shard(path, step, kept, dropped, only=balanced(costs, world_size)[rank])
        self._files[path.relative_to(self.run_dir).as_posix()] = sha256(path)

    def files(self, steps: Iterable[int]) -> dict[str, str]:
        """The shards of these steps, with their SHA-256. On every process: that all have answered says that all of the
        shards are written."""
        wanted = set(steps)
        self._files = {name: digest for name, digest in self._files.items() if shard_step(Path(name).name) in wanted}
        found = self.cluster.gather(self._files, "the checkpoint")
        return dict(sorted(item for files in found for item in files.items()))
