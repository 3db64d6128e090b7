"""Where records end in a JSON text, found block by block without parsing it."""

from __future__ import annotations

import numpy as np

_QUOTE, _BACKSLASH, _OPEN, _CLOSE = 0x22, 0x5C, 0x7B, 0x7D


class JsonScanner:
    """Follows strings and brackets through a JSON text given block by block, and finds where values of depth 1 end.

    RFC 8259 needs no more state than this: inside a string or not, how deep, how many backslashes just before.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._backslashes = 0

    def ends(self, block: np.ndarray) -> np.ndarray:
        """Positions in `block` (uint8) just after each bracket that closes back to depth 1, or to 0.

        A position is negative (-p) where the depth came back to 0: the end of the whole text.
        """
        quotes = np.flatnonzero(block == _QUOTE)
        if self._backslashes or (block == _BACKSLASH).any():
            quotes = np.delete(quotes, self._escaped(block, quotes))
        # `[]{}` are the bytes whose bits outside 0x26 are 0x59; the five others that are so are sorted out below.
        at = np.flatnonzero((block & 0xD9) == 0x59)
        kind = block[at] | 0x20  # `[` and `{` are now the same, and so are `]` and `}`
        inside = (np.searchsorted(quotes, at) & 1).astype(bool) ^ self.in_string
        self.in_string ^= bool(len(quotes) & 1)
        bracket = np.flatnonzero(((kind == _OPEN) | (kind == _CLOSE)) & ~inside)
        closes = kind[bracket] == _CLOSE
        depth = self.depth + np.cumsum(np.where(closes, np.int8(-1), np.int8(1)), dtype=np.int32)
        if len(depth):
            self.depth = int(depth[-1])
        self._count_trailing_backslashes(block)
        ends = np.flatnonzero(closes & (depth <= 1))
        where = at[bracket[ends]] + 1
        return np.where(depth[ends] == 1, where, -where)

    def _escaped(self, block: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """Indices of the quotes that stand behind an odd number of backslashes."""
        before = np.where(quotes > 0, block[quotes - 1], _BACKSLASH if self._backslashes else 0)
        behind = np.flatnonzero(before == _BACKSLASH)
        two_before = quotes[behind] - 2
        single = (two_before >= 0) & (block[np.maximum(two_before, 0)] != _BACKSLASH)
        escaped = [behind[single]]
        for i in behind[~single].tolist():  # runs of backslashes are rare
            p = int(quotes[i]) - 1
            while p >= 0 and block[p] == _BACKSLASH:
                p -= 1
            run = int(quotes[i]) - 1 - p + (self._backslashes if p < 0 else 0)
            if run % 2:
                escaped.append(np.array([i]))
        return np.concatenate(escaped)

    def _count_trailing_backslashes(self, block: np.ndarray) -> None:
        p = len(block) - 1
        while p >= 0 and block[p] == _BACKSLASH:
            p -= 1
        run = len(block) - 1 - p
        self._backslashes = run if p >= 0 else self._backslashes + run
