"""Texts cut into words where no token can reach across, so that a word that comes again is encoded once.

A BPE token is made by merging neighbours, so no token spans two characters that stand side by side in no piece of the
vocabulary. In a vocabulary of sentencepiece's kind nearly no piece has a space behind a letter; each text can be cut before
its spaces, and its ids are those of its words, one after the other. What may not be cut is read off the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from llava_tune.data.arrow import strings

_SPACE = 0x20
_META = "▁"  # what sentencepiece writes a space as


@dataclass(frozen=True)
class Words:
    """Texts as words.

    Attributes:
        words: each different one, once.
        codes: int64 [words of all texts], which word each is.
        offsets: int64 [texts + 1] into codes.
    """

    words: list[str]
    codes: np.ndarray
    offsets: np.ndarray


def cut_table(tokenizer: dict[str, Any]) -> np.ndarray | None:
    """Behind which bytes a text may be cut before a space: bool [256]; None if this tokenizer's texts can't be cut.

    Args:
        tokenizer: a tokenizer.json, parsed.
    """
    model = tokenizer["model"]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _META}
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    plain = model["type"] == "BPE" and not any(model.get(key) for key in odd)
    if not plain or tokenizer["normalizer"] != replaces or tokenizer["pre_tokenizer"] is not None:
        return None
    added = tokenizer["added_tokens"]
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added):
        return None
    table = np.ones(256, bool)
    table[[_SPACE, _META.encode()[-1]]] = False  # runs of spaces have pieces of their own
    for piece in [*model["vocab"], *(t["content"].replace(" ", _META) for t in added)]:
        at = piece.find(_META, 1)
        while at > 0:
            table[piece[at - 1].encode()[-1]] = False
            at = piece.find(_META, at + 1)
    return table if table[ord("a") : ord("z") + 1].all() else None


def cut(texts: list[str], table: np.ndarray | None) -> Words:
    """Cut texts before each space that `table` allows; without a table each text is one word."""
    column = strings(texts, pa.large_string())
    offsets = np.frombuffer(column.buffers()[1], np.int64)[: len(texts) + 1]
    starts = offsets
    if table is not None and len(texts):
        data = np.frombuffer(column.buffers()[2], np.uint8)[: offsets[-1]]
        spaces = np.flatnonzero(data == _SPACE)
        is_start = np.zeros(len(data) + 1, bool)
        is_start[spaces[table[data[spaces - 1]]]] = True
        is_start[offsets] = True
        starts = np.flatnonzero(is_start)
    column = pa.LargeStringArray.from_buffers(len(starts) - 1, pa.py_buffer(starts), column.buffers()[2])
    encoded = column.dictionary_encode()
    where = np.searchsorted(starts, offsets) if starts is not offsets else np.arange(len(texts) + 1)
    return Words(
        encoded.dictionary.to_pylist(),
        np.frombuffer(encoded.indices.buffers()[1], np.int32)[: len(encoded)].astype(np.int64),
        where,
    )
