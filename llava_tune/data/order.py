"""The order of an epoch: a pure function of (seed, epoch, lengths), whatever the ranks, workers and micro batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_GROUP = 64
"""Global batches whose samples are sorted by length together."""


def epoch_order(
    lengths: np.ndarray, epoch: int, seed: int, global_batch_size: int, group_by_length: bool
) -> np.ndarray:
    """Sample indices of an epoch, int64 [steps, global_batch_size].

    The last step is filled up from the epoch's start, so that every step has a whole global batch and no sample is left
    out. Grouping shuffles, sorts by length within runs of batches, then shuffles the batches.
    """
    n = len(lengths)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n)
    steps = -(-n // global_batch_size)
    order = np.resize(order, steps * global_batch_size)
    if not group_by_length:
        return order.reshape(steps, global_batch_size)
    run = _GROUP * global_batch_size
    for start in range(0, len(order), run):
        part = order[start : start + run]
        order[start : start + run] = part[np.argsort(lengths[part], kind="stable")]
    return order.reshape(steps, global_batch_size)[rng.permutation(steps)]


class BatchOrder:
    """The micro batches of one rank, from any step on, without replaying what came before.

    Args:
        lengths: int32 [samples].
        start_step: optimizer steps done already.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
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
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.group_by_length = group_by_length
        self.rank, self.world_size = rank, world_size
        self.start_step, self.total_steps = start_step, total_steps
        self.steps_per_epoch = -(-len(lengths) // global_batch_size)
        self.accumulation = global_batch_size // (micro_batch_size * world_size)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for _, batch in self.steps():
            # Neighbours have like lengths: deal them to ranks and accumulation steps in runs of a micro batch.
            micro = batch.reshape(self.accumulation, self.world_size, self.micro_batch_size)
            yield from micro[:, self.rank].tolist()

    def steps(self) -> Iterator[tuple[int, np.ndarray]]:
        """(step, sample indices of its global batch) from start_step on."""
        epoch, order = -1, np.zeros((0, 0), np.int64)
        for step in range(self.start_step, self.total_steps):
            now, within = divmod(step, self.steps_per_epoch)
            if now != epoch:
                epoch = now
                order = epoch_order(self.lengths, epoch, self.seed, self.global_batch_size, self.group_by_length)
            yield step, order[within]
