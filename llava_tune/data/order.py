"""The order of an epoch: a pure function of (seed, epoch, lengths, mix), whatever the ranks, workers and micro batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_GROUP = 64
"""Global batches whose samples are sorted by length together."""


@dataclass(frozen=True)
class Share:
    """Rows [start, stop) of a store, and how many samples of them an epoch takes."""

    start: int
    stop: int
    count: int


class Epoch:
    """One epoch's global batches: `epoch[step]` is the rows of a step, [global_batch_size].

    All samples are shuffled; with grouping they are sorted by length within runs of batches, and the batches shuffled. The last
    step is filled up from the epoch's start, so that every step has a whole global batch and no sample is left out. A run is
    sorted when its first batch is asked for, so that an epoch of any size begins at once.

    Args:
        lengths: int32 [rows of the store].
        shares: what an epoch takes; see `Share`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        shares: Sequence[Share],
        *,
        epoch: int,
        seed: int,
        global_batch_size: int,
        group_by_length: bool,
    ) -> None:
        self.lengths, self.size = lengths, global_batch_size
        rng = np.random.default_rng([seed, epoch])
        total = sum(share.count for share in shares)
        steps = -(-total // global_batch_size)
        self._order = np.empty(steps * global_batch_size, np.int32 if len(lengths) < 2**31 else np.int64)
        at = 0
        for k, share in enumerate(shares):
            self._order[at : at + share.count] = _taken(share, epoch, [seed, k])
            at += share.count
        rng.shuffle(self._order[:total])
        self._order[total:] = np.resize(self._order[:total], len(self._order) - total)
        self._steps = rng.permutation(steps) if group_by_length else None
        self._sorted = np.zeros(-(-steps // _GROUP), bool)

    def __len__(self) -> int:
        return len(self._order) // self.size

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < len(self):
            raise IndexError(step)
        if self._steps is not None:
            step = int(self._steps[step])
            run = step // _GROUP
            if not self._sorted[run]:
                rows = self._order[run * _GROUP * self.size : (run + 1) * _GROUP * self.size]
                rows[:] = rows[np.argsort(self.lengths[rows], kind="stable")]
                self._sorted[run] = True
        return self._order[step * self.size : (step + 1) * self.size]


def _taken(share: Share, epoch: int, seed: list[int]) -> np.ndarray:
    """The rows that an epoch takes: the next `count` of an endless row of shuffled passes over the share."""
    rows = share.stop - share.start
    if share.count % rows == 0:
        return np.tile(np.arange(share.start, share.stop, dtype=np.int64), share.count // rows)
    first, last = epoch * share.count, (epoch + 1) * share.count
    taken = []
    for turn in range(first // rows, -(-last // rows)):
        order = np.random.default_rng([*seed, turn]).permutation(rows)
        taken.append(order[max(0, first - turn * rows) : last - turn * rows])
    return share.start + np.concatenate(taken)


class BatchOrder:
    """The micro batches of one rank, from any step on, without replaying what came before.

    Args:
        lengths: int32 [rows of the store].
        shares: what an epoch takes; None: each row once.
        start_step: optimizer steps done already.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        shares: Sequence[Share] | None = None,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        group_by_length: bool,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        total_steps: int,
    ) -> None:
        self.lengths, self.seed = lengths, seed
        self.shares = shares if shares is not None else [Share(0, len(lengths), len(lengths))]
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.group_by_length = group_by_length
        self.rank, self.world_size = rank, world_size
        self.start_step, self.total_steps = start_step, total_steps
        self.steps_per_epoch = -(-sum(s.count for s in self.shares) // global_batch_size)
        self.accumulation = global_batch_size // (micro_batch_size * world_size)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for _, batch in self.steps():
            # Neighbours have like lengths: deal them to ranks and accumulation steps in runs of a micro batch.
            micro = batch.reshape(self.accumulation, self.world_size, self.micro_batch_size)
            yield from micro[:, self.rank].tolist()

    def steps(self) -> Iterator[tuple[int, np.ndarray]]:
        """(step, rows of its global batch) from start_step on."""
        number, epoch = -1, None
        for step in range(self.start_step, self.total_steps):
            now, within = divmod(step, self.steps_per_epoch)
            if epoch is None or now != number:
                number, epoch = now, self.epoch(now)
            yield step, epoch[within]

    def epoch(self, number: int) -> Epoch:
        """An epoch by its number, from 0."""
        return Epoch(
            self.lengths,
            self.shares,
            epoch=number,
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            group_by_length=self.group_by_length,
        )
