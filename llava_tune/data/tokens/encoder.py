"""Bulk encoding of plain text: the fastest encoder installed, proved against the tokenizer on the data itself."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_tune.data.tokens.words import cut

PROOF_STRINGS = 16
"""Strings of each batch that the reference encodes too."""


@dataclass(frozen=True)
class Encoded:
    """Texts as words, and words as ids.

    Attributes:
        ids: int32 [ids of all different words].
        offsets: int64 [different words + 1] into ids.
        codes: int64 [words of all texts], which word each is.
        text_offsets: int64 [texts + 1] into codes.
    """

    ids: np.ndarray
    offsets: np.ndarray
    codes: np.ndarray
    text_offsets: np.ndarray

    def of(self, text: int) -> np.ndarray:
        """The ids of one text, int32 [n]."""
        codes = self.codes[self.text_offsets[text] : self.text_offsets[text + 1]].tolist()
        return np.concatenate([self.ids[:0], *(self.ids[self.offsets[c] : self.offsets[c + 1]] for c in codes)])


class Encoder:
    """Encodes strings as ordinary text, never as control tokens.

    Args:
        plain_json: a tokenizer.json without special tokens.
        cut_after: bytes behind which texts may be cut before a space; None: they can't be cut. See `words`.
    """

    def __init__(self, plain_json: str, cut_after: Sequence[int] | None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        self.fell_back = False
        with ThreadPoolExecutor(1) as beside:
            fast = beside.submit(_fast_tokenizer, plain_json)
            time.sleep(0.005)  # fastokens releases the interpreter once it has begun, tokenizers never: fastokens first
            self.reference = Tokenizer.from_str(plain_json)
            self._fast = fast.result()
        if hasattr(self.reference.model, "_resize_cache"):
            self.reference.model._resize_cache(0)  # it would keep 10,000 texts, and none comes twice
        self._table = None if cut_after is None else np.isin(np.arange(256), list(cut_after))

    @property
    def name(self) -> str:
        if self._fast is not None:
            return "fastokens"
        return "tokenizers (fastokens gave other ids)" if self.fell_back else "tokenizers"

    def encode(self, texts: list[str], forbidden: np.ndarray) -> Encoded:
        """
        Args:
            forbidden: ids that no text may give (control tokens), int32 [n].
        """
        words = cut(texts, self._table)
        if self._fast is not None:
            flat, bounds = self._fast.encode_batch_flat(words.words)
            ids = np.frombuffer(flat, np.uint32).astype(np.int32)
            offsets = np.frombuffer(bounds, np.uint64).astype(np.int64)
            encoded = Encoded(ids, offsets, words.codes, words.offsets)
            if not self._proved(texts, encoded):
                self._fast, self._table, self.fell_back = None, None, True
                return self.encode(texts, forbidden)
        else:
            ids, offsets = self._encode_reference(words.words)
            encoded = Encoded(ids, offsets, words.codes, words.offsets)
            if self._table is not None and not self._proved(texts, encoded):
                self._table = None
                return self.encode(texts, forbidden)
        if len(forbidden) and np.isin(ids, forbidden).any():
            ids, offsets = self._without_forbidden(words.words, ids, offsets, forbidden)
            return Encoded(ids, offsets, words.codes, words.offsets)
        return encoded

    def _proved(self, texts: list[str], encoded: Encoded) -> bool:
        stride = max(1, len(texts) // PROOF_STRINGS)
        sample = range(0, len(texts), stride)
        expected = self.reference.encode_batch_fast([texts[i] for i in sample], add_special_tokens=False)
        return all(encoded.of(i).tolist() == e.ids for i, e in zip(sample, expected, strict=True))

    def _encode_reference(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [e.ids for e in self.reference.encode_batch_fast(texts, add_special_tokens=False)]
        return _join([np.array(row, np.int32) for row in rows])

    def _without_forbidden(
        self, words: list[str], ids: np.ndarray, offsets: np.ndarray, forbidden: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode the words that gave a control token a character at a time, which can't give one of several."""
        rows = [ids[a:b] for a, b in itertools.pairwise(offsets.tolist())]
        for i, row in enumerate(rows):
            if np.isin(row, forbidden).any():
                pieces = self._encode_reference(list(words[i]))[0]
                rows[i] = pieces[~np.isin(pieces, forbidden)]
        return _join(rows)


def _fast_tokenizer(plain_json: str) -> Any:
    """fastokens' tokenizer, or None where it is not installed or doesn't know this kind."""
    try:
        import fastokens

        return fastokens.Tokenizer.from_json_str(plain_json)
    except (ImportError, ValueError):
        return None


def _join(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    return flat.astype(np.int32, copy=False), offsets
