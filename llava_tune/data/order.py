"""The order of an epoch: a pure function of (seed, epoch, lengths, mix), whatever the ranks, workers and micro batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava_tune.data.packing import count_packs, pack

_GROUP = 64
"""Global batches whose samples are sorted by length together."""


@dataclass(frozen=True)
class Share:
    """Rows [start, stop) of a store, and how many samples of them an epoch takes."""

    start: int
    stop: int
    count: int


def _rows(lengths: np.ndarray, shares: Sequence[Share], epoch: int, seed: int) -> np.ndarray:
    """The rows that an epoch takes, share by share; int32 where that is enough."""
    order = np.empty(sum(share.count for share in shares), np.int32 if len(lengths) < 2**31 else np.int64)
    at = 0
    for k, share in enumerate(shares):
        order[at : at + share.count] = _taken(share, epoch, [seed, k])
        at += share.count
    return order


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
        order = _rows(lengths, shares, epoch, seed)
        rng.shuffle(order)
        steps = -(-len(order) // global_batch_size)
        self._order = np.resize(order, steps * global_batch_size) if len(order) % global_batch_size else order
        self._steps = rng.permutation(steps) if group_by_length else None
        self._sorted = np.zeros(-(-steps // _GROUP), bool)

    def __len__(self) -> int:
        return len(self._order) // self.size

    def __getitem__(self, step: int) -> list[int]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        if self._steps is not None:
            step = int(self._steps[step])
            run = step // _GROUP
            if not self._sorted[run]:
                rows = self._order[run * _GROUP * self.size : (run + 1) * _GROUP * self.size]
                rows[:] = rows[np.argsort(self.lengths[rows], kind="stable")]
                self._sorted[run] = True
        found: list[int] = self._order[step * self.size : (step + 1) * self.size].tolist()
        return found


class PackedEpoch:
    """One epoch's global batches of packs: `epoch[step]` is the rows of each pack of a step, global_batch_size tuples.

    Samples of one length are shuffled, all are packed (`packing.pack`), and the packs shuffled; the last step is filled up from the start.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        shares: Sequence[Share],
        *,
        epoch: int,
        seed: int,
        global_batch_size: int,
        pack_length: int,
    ) -> None:
        self.size = global_batch_size
        rng = np.random.default_rng([seed, epoch])
        self._rows = _rows(lengths, shares, epoch, seed)
        self._packs = pack(lengths[self._rows], pack_length, rng)
        steps = -(-len(self._packs) // global_batch_size)
        self._order = np.resize(rng.permutation(len(self._packs)), steps * global_batch_size)

    def __len__(self) -> int:
        return len(self._order) // self.size

    def __getitem__(self, step: int) -> list[tuple[int, ...]]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        packs = self._order[step * self.size : (step + 1) * self.size].tolist()
        return [tuple(self._rows[self._packs[k]].tolist()) for k in packs]


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


Item = int | tuple[int, ...]
"""What makes one row of a batch: a row of the store, or several packed together."""


class BatchOrder:
    """The micro batches of one rank, from any step on, without replaying what came before.

    Args:
        lengths: int32 [rows of the store].
        shares: what an epoch takes; None: each row once.
        pack_length: pack samples into rows of so many tokens; None: a sample is a row.
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
        pack_length: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        total_steps: int | None = None,
        epochs: float = 1.0,
    ) -> None:
        self.lengths, self.seed = lengths, seed
        self.shares = shares if shares is not None else [Share(0, len(lengths), len(lengths))]
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.group_by_length, self.pack_length = group_by_length, pack_length
        self.rank, self.world_size = rank, world_size
        self.accumulation = global_batch_size // (micro_batch_size * world_size)
        self._epoch_steps: list[int] = []  # steps of the epochs that were looked at, where packs make them differ
        self.steps_per_epoch = self._steps_of(0)
        self.start_step = start_step
        self.total_steps = total_steps if total_steps is not None else math.ceil(epochs * self.steps_per_epoch)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Item]]:
        for _, batch in self.steps():
            # Neighbours have like lengths: deal them to ranks and accumulation steps in runs of a micro batch.
            for k in range(self.accumulation):
                first = (k * self.world_size + self.rank) * self.micro_batch_size
                yield batch[first : first + self.micro_batch_size]

    def steps(self) -> Iterator[tuple[int, list[Item]]]:
        """(step, what makes up its global batch) from start_step on."""
        number, within = self._locate(self.start_step)
        epoch = self.epoch(number)
        for step in range(self.start_step, self.total_steps):
            if within == len(epoch):
                number, within = number + 1, 0
                epoch = self.epoch(number)
            yield step, list(epoch[within])
            within += 1

    def _locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step within it."""
        number = 0
        while step >= self._steps_of(number):
            if not self._varies():
                return divmod(step, self.steps_per_epoch)
            step -= self._steps_of(number)
            number += 1
        return number, step

    def _varies(self) -> bool:
        """Whether epochs may differ in steps: packs of another part of a data set each time."""
        return self.pack_length is not None and any(s.count % (s.stop - s.start) for s in self.shares)

    def _steps_of(self, number: int) -> int:
        if self.pack_length is None:
            return -(-sum(s.count for s in self.shares) // self.global_batch_size)
        if not self._varies():
            self._epoch_steps = self._epoch_steps or [self._steps_of_any()]
            return self._epoch_steps[0]
        while len(self._epoch_steps) <= number:
            self._epoch_steps.append(len(self.epoch(len(self._epoch_steps))))
        return self._epoch_steps[number]

    def _steps_of_any(self) -> int:
        """Steps of an epoch that takes every row so and so often: how many packs there are needs no order."""
        assert self.pack_length is not None
        counts = np.zeros(self.pack_length + 1, np.int64)
        for share in self.shares:
            found = np.bincount(self.lengths[share.start : share.stop], minlength=len(counts))
            if len(found) > len(counts):
                raise ValueError(f"a sample of {len(found) - 1} tokens doesn't fit into rows of {self.pack_length}")
            counts += found * (share.count // (share.stop - share.start))
        return -(-count_packs(counts, self.pack_length) // self.global_batch_size)

    def epoch(self, number: int) -> Epoch | PackedEpoch:
        """An epoch by its number, from 0."""
        common = {"epoch": number, "seed": self.seed, "global_batch_size": self.global_batch_size}
        if self.pack_length is None:
            return Epoch(self.lengths, self.shares, **common, group_by_length=self.group_by_length)
        return PackedEpoch(self.lengths, self.shares, **common, pack_length=self.pack_length)

    def samples_per_step(self) -> float:
        """How many samples a step of the first epoch has on average."""
        return sum(s.count for s in self.shares) / self.steps_per_epoch if self.pack_length else self.global_batch_size
