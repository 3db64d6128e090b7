"""JSON and JSONL files, plain or compressed, cut into ranges of whole records by one pass that holds no more than a part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from llava_tune.data.plain import RawRecord
from llava_tune.data.sources import base
from llava_tune.data.sources.base import BadRow, Chunk, Source, Span
from llava_tune.data.sources.scanner import JsonScanner
from llava_tune.errors import InputError

Shape = Literal["json", "jsonl"]

_BLOCK = 1 << 18  # fits the cache: twice as fast as a mebibyte
_SEPARATORS = b", \t\r\n"
_OPEN, _CLOSE = b"[]"
_DECODER = msgspec.json.Decoder(list[RawRecord])
_BOM = b"\xef\xbb\xbf"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class TextSource(Source):
    """A JSON array of records, or a JSON value a line; gzip and Zstandard are read through.

    Raises:
        InputError: it is empty, or neither.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.compressed = path.suffix in COMPRESSIONS
        with _Stream(path) as file:
            self.shape: Shape = _shape(path, file)
        self._digest = xxhash.xxh3_128()

    @property
    def part_bytes(self) -> int:
        # Text is compressed about eightfold.
        return max(base.PART_BYTES, -(-self.bytes * (8 if self.compressed else 1) // base.MAX_PARTS))

    def spans(self) -> Iterator[Span]:
        """See Source.spans.

        Raises:
            InputError: the JSON array is cut off, or goes on after its end; or the compressed file is broken.
        """
        self._digest.reset()
        self._read = 0
        self._held: list[bytes] = []
        cuts = self._json_cuts() if self.shape == "json" else self._line_cuts()
        previous: int | None = None
        held_from = cost_from = 0
        for cut in cuts:
            if previous is not None and cut > previous:
                if self.compressed:
                    text = b"".join(self._held)
                    piece, rest = text[previous - held_from : cut - held_from], text[cut - held_from :]
                    yield Span(previous, cut, self._read - cost_from, piece)
                    self._held, held_from, cost_from = [rest], cut, self._read
                else:
                    yield Span(previous, cut, cut - previous)
            previous = cut

    def digest(self) -> str:
        return self._digest.hexdigest()

    def read(self, span: Span) -> Chunk:
        if span.text is not None:
            return TextChunk(span.text, self.shape)
        with self.path.open("rb") as file:
            file.seek(span.start)
            return TextChunk(file.read(span.end - span.start), self.shape)

    def first_row(self) -> Any:
        try:
            with _Stream(self.path) as file:
                head = file.read(_BLOCK)
                while len(head) < 64 * _BLOCK and not self._whole(head) and (more := file.read(_BLOCK)):
                    head += more
        except OSError:
            return None  # `spans` then says what is wrong
        if self.shape == "json":
            head = head[head.index(b"[") + 1 :]
        for _, row in TextChunk(head.removeprefix(_BOM), self.shape).rows():
            return None if isinstance(row, BadRow) else row
        return None

    def _whole(self, head: bytes) -> bool:
        """Whether the first record ends within `head`."""
        if self.shape == "jsonl":
            return b"\n" in head.strip()
        return len(JsonScanner().ends(np.frombuffer(head, np.uint8))) > 0

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        with _Stream(self.path) as file:
            offset = 0
            while True:
                try:
                    block = file.read(_BLOCK)
                except OSError as error:
                    raise InputError(
                        f"data_path {self.path}: can't be decompressed after {offset:,} bytes ({error}). It looks cut off or "
                        "damaged; copy or download it again"
                    ) from error
                if not block:
                    break
                self._digest.update(block)
                self._read = file.position
                if self.compressed:
                    self._held.append(block)
                yield offset, block
                offset += len(block)
        self._length = offset

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
        yield self._length

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
            ends = scanner.ends(np.frombuffer(block, np.uint8))
            if len(ends) and offset + abs(int(ends[-1])) - last < self.part_bytes and ends.min() > 0:
                records += len(ends)
                continue
            for end in ends.tolist():
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


class TextChunk(Chunk):
    """Records of a JSON array with their commas, or lines."""

    def __init__(self, text: bytes, shape: Shape) -> None:
        self.text, self.shape = text, shape
        self.units = int(np.count_nonzero(np.frombuffer(text, np.uint8) == 10))

    def typed(self) -> list[RawRecord] | None:
        text = self.text
        if self.shape == "jsonl":
            text = text.removeprefix(_BOM).strip(_SEPARATORS).replace(b"\n", b",")
        begin, end = 0, len(text)
        while begin < end and text[begin] in _SEPARATORS:
            begin += 1
        while begin < end and text[end - 1] in _SEPARATORS:
            end -= 1
        array = bytearray(end - begin + 2)  # the text between brackets, copied once
        array[0], array[1:-1], array[-1] = _OPEN, memoryview(text)[begin:end], _CLOSE
        try:
            return _DECODER.decode(array)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def rows(self) -> Iterator[tuple[int, Any]]:
        for line, raw in self.split():
            try:
                yield line, msgspec.json.decode(raw)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                yield line, BadRow(f"not valid JSON: {error}")
            except RecursionError:
                yield line, BadRow("not valid JSON: nested too deep")

    def split(self) -> Iterator[tuple[int, bytes]]:
        """(line within the span from 0, bytes) of each record, without parsing them."""
        text = self.text
        line = 0
        if self.shape == "jsonl":
            for line, raw in enumerate(text.split(b"\n")):
                if raw := raw.removeprefix(_BOM).strip():
                    yield line, raw
            return
        scanner = JsonScanner()
        scanner.depth = 1
        start = 0
        for end in scanner.ends(np.frombuffer(text, np.uint8)).tolist():
            raw = text[start : abs(end)]
            body = raw.lstrip(_SEPARATORS)
            line += raw[: len(raw) - len(body)].count(b"\n")
            yield line, body
            line += body.count(b"\n")
            start = abs(end)
        if rest := text[start:].strip(_SEPARATORS):
            yield line, rest


def _shape(path: Path, file: _Stream) -> Shape:
    try:
        head = file.read(1 << 16).removeprefix(_BOM).lstrip()
    except OSError as error:
        raise InputError(f"data_path {path}: can't be decompressed ({error})") from error
    if not head:
        raise InputError(f"data_path {path}: the file is empty")
    if head[:1] == b"{":
        return "jsonl"
    if head[:1] != b"[":
        raise InputError(
            f"data_path {path}: expected a JSON array of records or one JSON object a line; the file starts with {head[:20]!r}"
        )
    line, newline, rest = head.partition(b"\n")
    try:  # a line that is a list of messages is one record
        first = msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return "json"
    return (
        "jsonl"
        if newline and rest.lstrip()[:1] == b"[" and first and isinstance(first[0], dict) and "role" in first[0]
        else "json"
    )


class _Stream:
    """A file's bytes, decompressed if its name says that it is compressed."""

    def __init__(self, path: Path) -> None:
        self._raw = pa.OSFile(str(path))
        kind = COMPRESSIONS.get(path.suffix)
        self._text = pa.CompressedInputStream(self._raw, kind) if kind else self._raw

    def read(self, size: int) -> bytes:
        return bytes(self._text.read(size))

    @property
    def position(self) -> int:
        """Bytes of the file itself that were read."""
        return int(self._raw.tell())

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._text.close()
        self._raw.close()
