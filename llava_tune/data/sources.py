"""Source files cut into byte ranges of whole records, by one pass that never holds more than a block."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from llava_tune.errors import InputError

Format = Literal["json", "jsonl"]

PART_BYTES = 16 << 20
"""Source bytes that become one file of the store."""
MAX_PARTS = 4096
"""A larger source has larger parts instead of more."""
_BLOCK = 4 << 20

_QUOTE, _OPEN, _CLOSE = 1, 2, 3
_CLASS = np.zeros(256, np.uint8)
_CLASS[ord('"')] = _QUOTE
_CLASS[[ord("["), ord("{")]] = _OPEN
_CLASS[[ord("]"), ord("}")]] = _CLOSE


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a source file: whole records with what separates them."""

    index: int
    start: int
    end: int


@dataclass(frozen=True)
class SourceFacts:
    """What identifies a source file's content."""

    name: str
    bytes: int
    mtime_ns: int
    xxh3: str


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
        at = np.flatnonzero(_CLASS[block])
        kind = _CLASS[block[at]]
        quote = kind == _QUOTE
        quotes = at[quote]
        escaped = self._escaped(block, quotes)
        keep = np.ones(len(at), bool)
        keep[np.flatnonzero(quote)[escaped]] = False
        at, kind = at[keep], kind[keep]
        parity = np.cumsum(kind == _QUOTE) + self.in_string
        outside = (parity % 2 == 0) & (kind != _QUOTE)
        if len(parity):
            self.in_string = bool(parity[-1] % 2)
        where, delta = at[outside], np.where(kind[outside] == _OPEN, 1, -1)
        depth = self.depth + np.cumsum(delta)
        if len(depth):
            self.depth = int(depth[-1])
        self._count_trailing_backslashes(block)
        closing = (delta == -1) & (depth <= 1)
        return np.where(depth[closing] == 1, where[closing] + 1, -(where[closing] + 1))

    def _escaped(self, block: np.ndarray, quotes: np.ndarray) -> np.ndarray:
        """Which of the quotes stand behind an odd number of backslashes."""
        escaped = np.zeros(len(quotes), bool)
        before = np.where(quotes > 0, block[quotes - 1], 92 if self._backslashes else 0)
        for i in np.flatnonzero(before == 92):
            p = int(quotes[i]) - 1
            while p >= 0 and block[p] == 92:
                p -= 1
            run = int(quotes[i]) - 1 - p + (self._backslashes if p < 0 else 0)
            escaped[i] = run % 2 == 1
        return escaped

    def _count_trailing_backslashes(self, block: np.ndarray) -> None:
        p = len(block) - 1
        while p >= 0 and block[p] == 92:
            p -= 1
        run = len(block) - 1 - p
        self._backslashes = run if p >= 0 else self._backslashes + run


def detect_format(path: Path) -> Format:
    """json for one array of records, jsonl for a record a line; told from the first byte that isn't white space.

    Raises:
        InputError: missing, empty, or neither.
    """
    if not path.is_file():
        raise InputError(f"data_path {path}: no such file. Expected a LLaVA JSON (one array of records) or JSONL file")
    with path.open("rb") as file:
        head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise InputError(f"data_path {path}: the file is empty")
    if head[:1] == b"[":
        return "json"
    if head[:1] == b"{":
        return "jsonl"
    raise InputError(
        f"data_path {path}: expected a JSON array of records or one JSON object a line; the file starts with {head[:20]!r}"
    )


class Source:
    """One source file: its format, its spans, its fingerprint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format: Format = detect_format(path)
        stat = path.stat()
        self.bytes = stat.st_size
        self.mtime_ns = stat.st_mtime_ns
        self._digest = xxhash.xxh3_128()
        self.part_bytes = max(PART_BYTES, -(-self.bytes // MAX_PARTS))

    def spans(self) -> Iterator[Span]:
        """The file's spans in order, each about `part_bytes` long; the file is read once, a block at a time.

        Raises:
            InputError: the JSON array is cut off, or goes on after its end.
        """
        cuts = self._json_cuts() if self.format == "json" else self._line_cuts()
        previous = None
        index = 0
        for cut in cuts:
            if previous is not None and cut > previous:
                yield Span(index, previous, cut)
                index += 1
            previous = cut

    def facts(self) -> SourceFacts:
        """The file's fingerprint; to be called when `spans` has been read to its end."""
        return SourceFacts(self.path.name, self.bytes, self.mtime_ns, self._digest.hexdigest())

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            offset = 0
            while block := file.read(_BLOCK):
                self._digest.update(block)
                yield offset, block
                offset += len(block)

    def _line_cuts(self) -> Iterator[int]:
        """0, then just after a newline every `part_bytes`, then the end."""
        yield 0
        target = self.part_bytes
        for offset, block in self._blocks():
            while target < offset + len(block):
                newline = block.find(b"\n", max(0, target - offset))
                if newline < 0:
                    break
                yield offset + newline + 1
                target = offset + newline + 1 + self.part_bytes
        yield self.bytes

    def _json_cuts(self) -> Iterator[int]:
        """Just after the array's `[`, then the end of a record every `part_bytes`, then the array's `]`."""
        scanner = JsonScanner()
        records = 0
        start = last = -1
        closed = False
        for offset, block in self._blocks():
            if start < 0:
                start = block.index(b"[") + 1
                yield start
                last = start
            if closed:
                self._nothing_after(block, offset)
                continue
            for end in scanner.ends(np.frombuffer(block, np.uint8)).tolist():
                if end < 0:
                    closed = True
                    yield offset - end - 1
                    self._nothing_after(block[-end:], offset - end)
                    break
                records += 1
                if offset + end - last >= self.part_bytes:
                    last = offset + end
                    yield last
        if not closed:
            raise InputError(
                f"data_path {self.path}: the JSON array is not closed: the file ends inside record {records + 1}, after "
                f"{records} whole ones ({self.bytes:,} bytes). It looks cut off; copy or download it again"
            )

    def _nothing_after(self, rest: bytes, offset: int) -> None:
        if rest.strip():
            raise InputError(
                f"data_path {self.path}: the JSON array ends before byte {offset:,}, but the file goes on with "
                f"{rest.strip()[:30]!r}. Expected one array of records"
            )


def read_span(path: Path, span: Span) -> bytes:
    """The bytes of a span."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return view[span.start : span.end]


def split_records(text: bytes, format: Format) -> Iterator[tuple[int, bytes]]:
    """(line within the span from 0, bytes) of each record of a span, without parsing them."""
    line = 0
    if format == "jsonl":
        for line, raw in enumerate(text.split(b"\n")):
            if raw.strip():
                yield line, raw
        return
    scanner = JsonScanner()
    scanner.depth = 1
    start = 0
    for end in scanner.ends(np.frombuffer(text, np.uint8)).tolist():
        raw = text[start : abs(end)]
        body = raw.lstrip(b", \t\r\n")
        line += raw[: len(raw) - len(body)].count(b"\n")
        yield line, body
        line += body.count(b"\n")
        start = abs(end)
    if rest := text[start:].strip(b", \t\r\n"):
        yield line, rest
