"""Samples put together into rows of a fixed length, from the lengths alone.

Longest-pack-first histogram packing (Krell et al., "Efficient Sequence Packing without Cross-contamination", arXiv:2107.02027):
it works on how many samples there are of each length, so its time hardly depends on their number; then the samples are dealt out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packs:
    """Rows of samples.

    Attributes:
        samples: int64 [samples], positions in the lengths that were packed, pack by pack.
        offsets: int64 [packs + 1] into samples.
    """

    samples: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.samples[self.offsets[pack] : self.offsets[pack + 1]]


def count_packs(counts: np.ndarray, capacity: int) -> int:
    """How many packs `pack` makes of so many samples of each length (integer [capacity + 1])."""
    return sum(repeat for repeat, _ in _strategies(counts.tolist(), capacity))


def pack(lengths: np.ndarray, capacity: int, rng: np.random.Generator | None = None) -> Packs:
    """Pack all samples; samples of one length are dealt out in random order, or without `rng` the first come first.

    Args:
        lengths: integer [samples], each from 1 to capacity.
        capacity: tokens of a row.

    Raises:
        ValueError: a sample is longer than a row.
    """
    if len(lengths) == 0:
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    if int(lengths.max()) > capacity:
        raise ValueError(f"a sample of {int(lengths.max())} tokens doesn't fit into rows of {capacity}")
    counts = np.bincount(lengths, minlength=capacity + 1)
    strategies = _strategies(counts.tolist(), capacity)
    # Samples sorted by length (16 bits sort in linear time); each strategy takes the next ones of its lengths.
    order = np.argsort(lengths.astype(np.uint16 if capacity < 2**16 else np.int64), kind="stable")
    taken = np.cumsum(counts) - counts
    if rng is not None:  # a length at a time stays in the cache; all at once takes several times as long
        for start, count in zip(taken[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
            rng.shuffle(order[start : start + count])
    total = sum(repeat for repeat, _ in strategies)
    sizes = np.concatenate([np.full(repeat, len(parts)) for repeat, parts in strategies])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    samples = np.empty(len(lengths), np.int64)
    at = 0
    for repeat, parts in strategies:
        block = samples[at : at + repeat * len(parts)].reshape(repeat, len(parts))
        for k, length in enumerate(parts):
            block[:, k] = order[taken[length] : taken[length] + repeat]
            taken[length] += repeat
        at += repeat * len(parts)
    assert at == len(lengths) and len(sizes) == total
    return Packs(samples, offsets)


def _strategies(counts: list[int], capacity: int) -> list[tuple[int, tuple[int, ...]]]:
    """(how many packs, the lengths in each), best fit from the longest length down."""
    free: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # room left -> packs
    rooms = np.zeros(capacity + 1, bool)
    for length in range(capacity, 0, -1):
        left = counts[length]
        while left:
            fitting = np.flatnonzero(rooms[length:])
            if len(fitting) == 0:
                per_pack = min(capacity // length, left)
                repeat = left // per_pack
                _add(free, rooms, capacity - per_pack * length, repeat, (length,) * per_pack)
                left -= repeat * per_pack
                continue
            room = length + int(fitting[0])
            repeat, parts = free[room].pop()
            if not free[room]:
                rooms[room] = False
            used = min(repeat, left)
            if used < repeat:
                _add(free, rooms, room, repeat - used, parts)
            _add(free, rooms, room - length, used, (*parts, length))
            left -= used
    return [packs for room in sorted(free) for packs in free[room]]


def _add(
    free: dict[int, list[tuple[int, tuple[int, ...]]]],
    rooms: np.ndarray,
    room: int,
    repeat: int,
    parts: tuple[int, ...],
) -> None:
    free.setdefault(room, []).append((repeat, parts))
    rooms[room] = room > 0
