"""Where an image is: a file below the image folder, a member of a tar file, or a cell of a table."""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from llava_tune.paths import inside

_MEMBER = re.compile(r"^(?P<file>.+\.tar)\?offset=(?P<offset>\d+)&size=(?P<size>\d+)(?:&name=.*)?$", re.DOTALL)
_CELL = re.compile(
    r"^(?P<file>.+\.(?:parquet|arrow))\?row=(?P<row>\d+)&column=(?P<column>[^&]+)(?:&item=(?P<item>\d+))?$", re.DOTALL
)


def member_reference(file: str, offset: int, size: int, name: str) -> str:
    """A member of a tar file, by where its bytes are."""
    return f"{file}?offset={offset}&size={size}&name={name}"


def cell_reference(file: str, row: int, column: str, item: int | None = None) -> str:
    """A cell of a Parquet or Arrow file; `item` of it, where it holds a list."""
    return f"{file}?row={row}&column={quote(column, safe='')}" + (f"&item={item}" if item is not None else "")


def open_reference(folder: Path, reference: str) -> BinaryIO | Path:
    """What `PIL.Image.open` takes: a path below `folder`, or the bytes.

    Raises:
        ValueError: it leaves the folder, or the cell holds no image.
        OSError: no such file, or it is shorter.
    """
    if "?" in reference:
        if match := _MEMBER.match(reference):
            return _member(inside(folder, match["file"]), int(match["offset"]), int(match["size"]))
        if match := _CELL.match(reference):
            item = int(match["item"]) if match["item"] is not None else None
            return _cell(inside(folder, match["file"]), int(match["row"]), unquote(match["column"]), item)
    return inside(folder, reference)


def _member(path: Path, offset: int, size: int) -> BinaryIO:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise OSError(f"{path.name} ends within the member at {offset:,}")
    return io.BytesIO(data)


def _cell(path: Path, row: int, column: str, item: int | None) -> BinaryIO:
    value = _arrow_cell(path, row, column) if path.suffix == ".arrow" else _parquet_cell(path, row, column)
    if item is not None:
        value = value[item] if value is not None and item < len(value) else None
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"row {row} of {path.name} has no image bytes in column {column!r}")
    return io.BytesIO(data)


@functools.lru_cache(maxsize=64)
def _arrow_table(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _arrow_cell(path: Path, row: int, column: str) -> Any:
    return _arrow_table(path).column(column)[row].as_py()


@functools.lru_cache(maxsize=16)
def _parquet_file(path: Path) -> tuple[Any, list[int]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, memory_map=True)
    ends: list[int] = []
    for group in range(file.metadata.num_row_groups):
        ends.append((ends[-1] if ends else 0) + file.metadata.row_group(group).num_rows)
    return file, ends


@functools.lru_cache(maxsize=2)
def _parquet_column(path: Path, group: int, column: str) -> Any:
    return _parquet_file(path)[0].read_row_group(group, columns=[column]).column(column)


def _parquet_cell(path: Path, row: int, column: str) -> Any:
    _, ends = _parquet_file(path)
    group = next(i for i, end in enumerate(ends) if row < end)
    return _parquet_column(path, group, column)[row - (ends[group - 1] if group else 0)].as_py()
