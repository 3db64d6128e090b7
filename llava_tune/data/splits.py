"""Which samples of a data set take part: `train[:95%]` and the like, as `datasets` writes them."""

from __future__ import annotations

import re

from llava_tune.errors import InputError

_SPLIT = re.compile(r"^(?P<name>[^\[\]]*)(?:\[(?P<start>-?\d+%?)?:(?P<end>-?\d+%?)?\])?$")


def split_name(split: str | None) -> str | None:
    """The name in `name[start:end]`, or None.

    Raises:
        InputError: it isn't of that form.
    """
    return _match(split)["name"] or None if split else None


def split_rows(split: str | None, rows: int) -> range:
    """The rows that `name[start:end]` means, of `rows`; a bound may be negative, or per cent.

    Raises:
        InputError: it isn't of that form, or no row is left.
    """
    if not split:
        return range(rows)
    match = _match(split)
    start, end = (_bound(match[key], rows, default) for key, default in (("start", 0), ("end", rows)))
    if start >= end:
        raise InputError(f"dataset.split {split!r}: no sample is left of {rows:,}")
    return range(start, end)


def _match(split: str) -> re.Match[str]:
    if match := _SPLIT.match(split):
        return match
    raise InputError(f"dataset.split {split!r}: expected a form such as train, train[:95%] or [1000:]")


def _bound(text: str | None, rows: int, default: int) -> int:
    if text is None:
        return default
    number = int(text.rstrip("%"))
    value = round(rows * number / 100) if text.endswith("%") else number
    return min(rows, max(0, value + rows if number < 0 else value))
