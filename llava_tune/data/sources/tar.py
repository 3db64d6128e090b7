"""WebDataset shards: tar files in which a sample is the members of one base name (https://github.com/webdataset/webdataset)."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.data.sources.base import BadRow, Chunk, Source, Span
from llava_tune.data.sources.refs import member_reference
from llava_tune.data.sources.tables import RowChunk
from llava_tune.errors import InputError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})
PART_SAMPLES = 16_384

Member = tuple[str, int, int]  # name, where its bytes begin, how many


class TarSource(Source):
    """One tar file. A sample's `json` member is its record (its image paths are replaced by the sample's own images); with
    only a `txt`, the text is the caption, and the question is the image."""

    unit = "sample"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._samples: list[tuple[str, list[Member]]] | None = None
        self._digest = ""

    def _index(self) -> list[tuple[str, list[Member]]]:
        """The samples in the file's order, from the headers alone."""
        if self._samples is not None:
            return self._samples
        samples: list[tuple[str, list[Member]]] = []
        try:
            with tarfile.open(self.path, "r:") as tar:
                for info in tar:
                    if not info.isfile():
                        continue
                    folder, _, base = info.name.rpartition("/")
                    key = f"{folder}/{base.partition('.')[0]}"
                    if not samples or samples[-1][0] != key:
                        samples.append((key, []))
                    samples[-1][1].append((info.name, info.offset_data, info.size))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(
                f"data_path {self.path}: not a whole tar file ({error}). Copy or download it again"
            ) from error
        if samples and samples[-1][1][-1][1] + samples[-1][1][-1][2] > self.bytes:
            raise InputError(f"data_path {self.path}: the tar file is cut off. Copy or download it again")
        if not samples:
            raise InputError(f"data_path {self.path}: the tar file holds no member")
        self._samples = samples
        return samples

    def spans(self) -> Iterator[Span]:
        count = len(self._index())
        for start in range(0, count, PART_SAMPLES):
            end = min(count, start + PART_SAMPLES)
            yield Span(start, end, self.bytes * end // count - self.bytes * start // count)
        self._digest = xxhash.xxh3_128(msgspec.json.encode(self._index())).hexdigest()
        self._samples = None  # a thousand shards of a hundred thousand samples are not held at once

    def digest(self) -> str:
        """Of the members' names, places and sizes: the images themselves are not read."""
        return self._digest

    def read(self, span: Span) -> Chunk:
        with self.path.open("rb") as file:
            return RowChunk([self._row(file, key, members) for key, members in self._index()[span.start : span.end]])

    def _row(self, file: Any, key: str, members: list[Member]) -> Any:
        texts: dict[str, bytes] = {}
        images = []
        for name, offset, size in members:
            suffix = name.rpartition(".")[2].lower()
            if suffix in IMAGE_SUFFIXES:
                images.append(member_reference(self.path.name, offset, size, name))
            elif suffix in ("json", "txt"):
                file.seek(offset)
                texts[suffix] = file.read(size)
        identity = key.lstrip("/")
        try:
            if "json" in texts:
                row = msgspec.json.decode(texts["json"])
            elif "txt" in texts:
                turns = [("human", IMAGE_PLACEHOLDER), ("gpt", texts["txt"].decode().strip())]
                row = {"conversations": [{"from": who, "value": text} for who, text in turns]}
            else:
                return BadRow("the sample has neither a .json nor a .txt member")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return BadRow(f"sample {identity}: {error}")
        if isinstance(row, dict):
            row = {"id": identity, **row}
            if images:
                row.pop("images", None)
                row["image"] = images if len(images) > 1 else images[0]
        return row

    def first_row(self) -> Any:
        with self.path.open("rb") as file:
            return self._row(file, *self._index()[0])
