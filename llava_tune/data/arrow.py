"""Arrow arrays of numpy arrays and of texts, made from their buffers: pyarrow.array imports pandas to look whether it was given a part of it,
which takes as long as preparing 20,000 records."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def numbers(values: np.ndarray) -> pa.Array:
    """An array that shares the memory of a one-dimensional numpy array."""
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


def strings(texts: list[str], kind: pa.DataType) -> pa.Array:
    """An array of texts.

    Args:
        kind: pa.string() (at most 2 GB in all) or pa.large_string().

    Raises:
        UnicodeEncodeError: a text holds half a surrogate pair.
        OverflowError: the texts are too long for the kind.
    """
    encoded = [text.encode() for text in texts]
    ends = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=ends[1:])
    if kind == pa.string():
        if ends[-1] > np.iinfo(np.int32).max:
            raise OverflowError(f"{int(ends[-1]):,} bytes of text in one array; pa.string() holds 2 GB")
        ends = ends.astype(np.int32)
    return pa.Array.from_buffers(kind, len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])
