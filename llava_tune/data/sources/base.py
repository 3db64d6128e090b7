"""What every kind of source file is to the rest: spans of whole records, and the rows of a span."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_tune.data.plain import RawRecord

PART_BYTES = 8 << 20
"""Source bytes that become one file of the store."""
MAX_PARTS = 4096
"""A larger source has larger parts instead of more."""


class BadRow(ValueError):
    """A row that can't even be read; the message says why."""


@dataclass(frozen=True)
class Span:
    """A part of a source: [start, end) of bytes or of rows, as the kind of source counts; whole records.

    Attributes:
        cost: source bytes that it takes, for the progress bar.
        text: the bytes themselves, where the file can't be read from the middle (a compressed one).
    """

    start: int
    end: int
    cost: int
    text: bytes | None = None

    def without_text(self) -> Span:
        """The same span, to be kept: it doesn't hold the text in memory."""
        return replace(self, text=None)


class Chunk(ABC):
    """The rows of one span, read.

    Attributes:
        units: lines (or rows) that the span takes up, to number those of the next.
    """

    units: int

    @abstractmethod
    def typed(self) -> list[RawRecord] | None:
        """All rows as LLaVA records at once, or None if any is not one."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, Any]]:
        """(line or row within the span, from 0; the row) of each; the row is a BadRow where it can't be read."""


class Source(ABC):
    """One source file.

    Attributes:
        path: the file or folder.
        bytes: its size; the unit of progress.
        mtime_ns: of the file.
        unit: what a left-out record's number counts: line or row.
        format: of its records (llava_tune/data/formats.py), set when it is opened.
    """

    path: Path
    bytes: int
    mtime_ns: int
    unit: str = "line"
    format: str = "llava"

    def __init__(self, path: Path) -> None:
        self.path = path
        stat = path.stat()
        self.bytes = stat.st_size
        self.mtime_ns = stat.st_mtime_ns

    @abstractmethod
    def spans(self) -> Iterator[Span]:
        """The spans in order; the same ones every time.

        Raises:
            InputError: the file is broken as a whole.
        """

    @abstractmethod
    def digest(self) -> str:
        """A hash of the content; to be called when `spans` has been read to its end."""

    @abstractmethod
    def read(self, span: Span) -> Chunk:
        """The rows of a span."""

    @abstractmethod
    def first_row(self) -> Any:
        """The first record as it is in the file, to tell its format by; None if it can't be read."""

    def identity(self) -> list[Any]:
        """What stays the same as long as the file does."""
        return [self.path.name, self.bytes, self.mtime_ns]
