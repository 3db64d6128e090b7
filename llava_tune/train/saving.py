"""Checkpoints written while training goes on: copied to memory at their step, then to the disk, and named when every rank's part is there."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._pytree import tree_iter, tree_map_only

from llava_tune.errors import RunFailed
from llava_tune.paths import sync, sync_tree
from llava_tune.train.checkpoint import STAGING, barrier, no_space, write_file_list

_SPARE = 1.5
"""A copy is made if this many times its size is free."""


class Saver:
    """Writes a run's checkpoints, one at a time; each is whole or absent. One thread a rank does what waits for the disk.

    Args:
        rank, ranks: of this process, and how many there are; all write to the same work dir.
        ranks_here: on this machine, which share its memory.
        background: let training go on meanwhile. A part that memory is too short to copy is written at once.
    """

    def __init__(self, work_dir: Path, rank: int, ranks: int, ranks_here: int, background: bool) -> None:
        self.work_dir, self.rank, self.ranks, self.ranks_here = work_dir, rank, ranks, ranks_here
        self._thread = ThreadPoolExecutor(1, "saver") if background else None
        self._pending: list[Future[None]] = []
        self._staged = work_dir / STAGING
        self._deadline: float | None = None
        self._broken = False
        self._said = False

    def begin(self, name: str) -> Path:
        """Wait for the checkpoint before, then give the folder to write this one to; every rank calls it.

        Raises:
            RunFailed: the one before could not be written.
        """
        self.wait()
        self._broken = False
        self._staged = self.work_dir / STAGING / name
        if self.rank == 0:
            self._staged.mkdir(parents=True, exist_ok=True)
            self._parts.mkdir(exist_ok=True)
        barrier()
        return self._staged

    @property
    def _parts(self) -> Path:
        """Holds a file for each rank whose part is written."""
        return self._staged.with_name(f".parts-{self._staged.name}")

    def write(self, save: Callable[[Any, Path], Any], content: Any, path: Path) -> None:
        """Call save(content, path) with the tensors' values of now.

        Args:
            content: tensors, in any nesting of containers.
        """
        if self._thread is None or not self._fits(content):
            save(content, path)
            return
        copied: dict[int, torch.Tensor] = {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in copied:
                copied[id(tensor)] = tensor.detach().to("cpu", copy=True)
            return copied[id(tensor)]

        self._pending.append(self._thread.submit(self._save, save, tree_map_only(torch.Tensor, copy, content), path))

    def _save(self, save: Callable[[Any, Path], Any], content: Any, path: Path) -> None:
        try:
            save(content, path)
        except Exception:
            self._broken = True
            raise

    def _fits(self, content: Any) -> bool:
        size = sum(t.numel() * t.element_size() for t in tree_iter(content) if isinstance(t, torch.Tensor))
        if size * self.ranks_here * _SPARE < available_memory():
            return True
        if not self._said and self.rank == 0:
            self._said = True
            print(
                f"checkpoints are written while training waits: {available_memory() / 1e9:.1f} GB of memory are free, too little for a "
                f"copy of {size / 1e9:.1f} GB a rank",
                file=sys.stderr,
                flush=True,
            )
        return False

    def publish(self, then: Callable[[], None]) -> None:
        """Give the checkpoint its name when every rank's part is on the disk; every rank calls it.

        Args:
            then: called once it has, on rank 0.
        """
        if self._thread is not None:
            self._pending.append(self._thread.submit(self._finish, then))
            return
        barrier()
        self._finish(then)
        barrier()

    def _finish(self, then: Callable[[], None]) -> None:
        if self._broken:
            return
        if self.ranks > 1:
            (self._parts / str(self.rank)).touch()
        if self.rank:
            return
        while self.ranks > 1 and len(list(self._parts.iterdir())) < self.ranks:
            if self._deadline is not None and time.monotonic() > self._deadline:
                return  # a rank is gone
            time.sleep(0.02)
        final = self.work_dir / self._staged.name
        if not final.exists():
            write_file_list(self._staged)
            sync_tree(self._staged)
            self._staged.rename(final)
            sync(self.work_dir)
            then()
        shutil.rmtree(self._parts)

    def check(self) -> None:
        """
        Raises:
            RunFailed: a checkpoint could not be written.
        """
        while self._pending and self._pending[0].done():
            self._taken(self._pending.pop(0))

    def wait(self) -> None:
        """Until the last checkpoint has its name; on the other ranks, until their part of it is written.

        Raises:
            RunFailed: it could not be written.
        """
        while self._pending:
            self._taken(self._pending.pop(0))

    def _taken(self, written: Future[None]) -> None:
        try:
            written.result()
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """
        Raises:
            RunFailed: the disk is full; what was written of the checkpoint is removed.
        """
        if not no_space(error):
            raise error
        for job in self._pending:
            job.cancel()
        shutil.rmtree(self._staged, ignore_errors=True)
        raise RunFailed(
            f"the disk is full: {self._staged.name} could not be written to {self.work_dir}, and was removed. The checkpoints before it "
            "are whole. Make space, then --resume"
        ) from error

    def close(self, patience: float) -> None:
        """The run has ended, well or not. A checkpoint that is being written is finished if the other ranks' parts come within `patience`
        seconds; this process ends only then."""
        self._deadline = time.monotonic() + patience
        if self._thread is not None:
            self._thread.shutdown(wait=False)


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of each cgroup that it is in, as Slurm and containers set them; what only
    caches files counts as free."""
    free: int = psutil.virtual_memory().available
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            root, names = Path("/sys/fs/cgroup/memory"), ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        elif not controllers:  # version 2
            root, names = Path("/sys/fs/cgroup"), ("max", "current", "inactive_file")
        else:
            continue
        folder = root / group.strip("/")
        for place in (folder, *folder.parents):
            try:
                limit, used = ((place / f"memory.{name}").read_text().strip() for name in names[:2])
                stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                free = min(free, int(limit) - int(used) + int(stat.get(names[2], 0)))
    return free
