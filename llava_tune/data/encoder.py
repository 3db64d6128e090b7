"""Bulk encoding of plain text: the fastest encoder installed, proved against the tokenizer on the data itself."""

from __future__ import annotations

import itertools
import os

import numpy as np

PROOF_STRINGS = 64
"""Strings of each batch that the reference encodes too."""


class Encoder:
    """Encodes strings as ordinary text, never as control tokens.

    Args:
        plain_json: a tokenizer.json without special tokens (`tokenizer.plain_json`).
        forbidden: ids that no text may give (control tokens), int32 [n].
    """

    def __init__(self, plain_json: str, forbidden: np.ndarray) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        self.reference = Tokenizer.from_str(plain_json)
        self.forbidden = np.asarray(forbidden, np.int32)
        self.fell_back = False
        try:
            import fastokens

            self._fast = fastokens.Tokenizer.from_json_str(plain_json)
        except (ImportError, ValueError):
            self._fast = None

    @property
    def name(self) -> str:
        return "tokenizers" if self._fast is None else "fastokens"

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts behind one another, int32 [total], and offsets, int64 [len(texts) + 1]."""
        if self._fast is None:
            ids, offsets = self._encode_reference(texts)
        else:
            flat, bounds = self._fast.encode_batch_flat(texts)
            ids = np.frombuffer(flat, np.uint32).astype(np.int32)
            offsets = np.frombuffer(bounds, np.uint64).astype(np.int64)
            if not self._proved(texts, ids, offsets):
                self._fast, self.fell_back = None, True
                ids, offsets = self._encode_reference(texts)
        if len(self.forbidden) and np.isin(ids, self.forbidden).any():
            return self._without_forbidden(texts, ids, offsets)
        return ids, offsets

    def _proved(self, texts: list[str], ids: np.ndarray, offsets: np.ndarray) -> bool:
        stride = max(1, len(texts) // PROOF_STRINGS)
        sample = range(0, len(texts), stride)
        expected = self.reference.encode_batch_fast([texts[i] for i in sample], add_special_tokens=False)
        return all(ids[offsets[i] : offsets[i + 1]].tolist() == e.ids for i, e in zip(sample, expected, strict=True))

    def _encode_reference(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [e.ids for e in self.reference.encode_batch_fast(texts, add_special_tokens=False)]
        return _join([np.array(row, np.int32) for row in rows])

    def _without_forbidden(
        self, texts: list[str], ids: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode the texts that gave a control token a character at a time, which can't give one of several."""
        rows = [ids[a:b] for a, b in itertools.pairwise(offsets.tolist())]
        for i, row in enumerate(rows):
            if np.isin(row, self.forbidden).any():
                pieces = self._encode_reference(list(texts[i]))[0]
                rows[i] = pieces[~np.isin(pieces, self.forbidden)]
        return _join(rows)


def _join(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    return flat.astype(np.int32, copy=False), offsets
