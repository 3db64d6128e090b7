"""Parquet files, and the Arrow files of a Hugging Face `datasets` folder. Image bytes in them are referred to, never read here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from llava_tune.data.plain import RawRecord
from llava_tune.data.sources.base import Chunk, Source, Span
from llava_tune.data.sources.refs import cell_reference
from llava_tune.errors import InputError

PART_ROWS = 32_768
"""Rows that become one file of the store."""
_EDGE = 1 << 20


class RowChunk(Chunk):
    """Rows that are Python objects already."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows
        self.units = len(rows)

    def typed(self) -> list[RawRecord] | None:
        try:
            return msgspec.convert(self._rows, list[RawRecord])
        except (msgspec.ValidationError, RecursionError):
            return None

    def rows(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self._rows)


class _TableSource(Source):
    unit = "row"

    def digest(self) -> str:
        """Of the first and last mebibyte: the file's data is not read as a whole, it may hold terabytes of images."""
        digest = xxhash.xxh3_128()
        with self.path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(_EDGE, self.bytes - _EDGE))
            digest.update(file.read())
        return digest.hexdigest()

    def _row_spans(self, rows: int) -> Iterator[Span]:
        for start in range(0, rows, PART_ROWS):
            end = min(rows, start + PART_ROWS)
            yield Span(start, end, self.bytes * end // rows - self.bytes * start // rows)

    def _rows_of(self, table: Any, first: int, embedded: dict[str, bool]) -> list[Any]:
        """Rows as dicts; a cell with image bytes becomes its reference, a text cell that holds JSON is parsed."""
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        for name, has_bytes in embedded.items():
            columns[name] = [self._images(cell, first + i, name, has_bytes) for i, cell in enumerate(columns[name])]
        for name in ("conversations", "messages"):
            if name in columns:
                columns[name] = [_parsed(cell) for cell in columns[name]]
        names = list(columns)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _images(self, cell: Any, row: int, column: str, has_bytes: bool) -> Any:
        if cell is None:
            return None
        if isinstance(cell, list):
            if not has_bytes:
                return [c["path"] for c in cell if c]
            return [cell_reference(self.path.name, row, column, k) for k in range(len(cell))]
        return cell_reference(self.path.name, row, column) if has_bytes else cell["path"]


def _parsed(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    try:
        return msgspec.json.decode(cell)
    except (msgspec.MsgspecError, RecursionError):
        return cell


def _image_columns(schema: Any) -> list[str]:
    """Columns of {bytes, path}, as `datasets` stores images, or lists of them."""
    names = []
    for field in schema:
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0:
            names.append(field.name)
    return names


class ParquetSource(_TableSource):
    """One Parquet file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"data_path {path}: not a whole Parquet file ({error}). Copy or download it again"
            ) from error
        with file:
            self.schema = file.schema_arrow
            self.rows = file.metadata.num_rows
            self.groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            self.embedded = {name: self._has_bytes(file, name) for name in _image_columns(self.schema)}
        if not self.rows:
            raise InputError(f"data_path {path}: holds no record")

    @staticmethod
    def _has_bytes(file: Any, name: str) -> bool:
        """Whether a column's images are in the file, told from the statistics of its row groups."""
        paths = [file.schema.column(i).path for i in range(len(file.schema))]
        leaves = [i for i, p in enumerate(paths) if p.split(".")[0] == name and p.split(".")[-1] == "bytes"]
        for group in range(file.metadata.num_row_groups):
            for leaf in leaves:
                column = file.metadata.row_group(group).column(leaf)
                if column.statistics is None or column.statistics.null_count != column.num_values:
                    return True
        return False

    def spans(self) -> Iterator[Span]:
        return self._row_spans(self.rows)

    def read(self, span: Span) -> Chunk:
        return RowChunk(self._between(span.start, span.end))

    def _between(self, start: int, end: int) -> list[Any]:
        leaves = [
            f"{n}.path" if not pa.types.is_list(self.schema.field(n).type) else f"{n}.list.element.path"
            for n in self.embedded
        ]
        names = [f.name for f in self.schema if f.name not in self.embedded] + leaves
        rows: list[Any] = []
        first = 0
        with pq.ParquetFile(self.path, memory_map=True) as file:
            for group, count in enumerate(self.groups):
                if first < end and first + count > start:
                    at = first
                    for batch in file.iter_batches(PART_ROWS, row_groups=[group], columns=names):
                        low, high = max(start - at, 0), min(end - at, batch.num_rows)
                        if low < high:
                            rows += self._rows_of(batch.slice(low, high - low), at + low, self.embedded)
                        at += batch.num_rows
                        if at >= end:
                            break
                first += count
        return rows

    def first_row(self) -> Any:
        return self._between(0, 1)[0]


class ArrowSource(_TableSource):
    """One Arrow file of a folder that `datasets` saved."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            table = self._table()
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"data_path {path}: not a whole Arrow file ({error}). Copy or download it again"
            ) from error
        self.rows = table.num_rows
        self.embedded = {n: _arrow_has_bytes(table.column(n)) for n in _image_columns(table.schema)}

    def _table(self) -> Any:
        return pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()

    def spans(self) -> Iterator[Span]:
        return self._row_spans(self.rows)

    def read(self, span: Span) -> Chunk:
        return RowChunk(self._between(span.start, span.end))

    def _between(self, start: int, end: int) -> list[Any]:
        table = self._table().slice(start, end - start)
        for name in self.embedded:
            column = table.column(name).combine_chunks()
            table = table.set_column(table.column_names.index(name), name, _without_bytes(column))
        return self._rows_of(table, start, self.embedded)

    def first_row(self) -> Any:
        return self._between(0, 1)[0] if self.rows else None


def _arrow_has_bytes(column: Any) -> bool:
    return any(
        chunk.flatten().field("bytes").null_count < len(chunk.flatten())
        if pa.types.is_list(chunk.type)
        else chunk.field("bytes").null_count < len(chunk)
        for chunk in column.chunks
        if len(chunk)
    )


def _without_bytes(column: Any) -> Any:
    """{bytes, path} as {path}, so that turning rows into Python objects doesn't copy the images."""
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    if pa.types.is_list(column.type):
        return pa.ListArray.from_arrays(column.offsets, _without_bytes(column.values), mask=column.is_null())
    return pa.StructArray.from_arrays([column.field("path")], ["path"], mask=column.is_null())


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        InputError: the split is missing or must be named; or rows were selected without rewriting them.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = msgspec.json.decode((folder / "dataset_dict.json").read_bytes())["splits"]
        if split is None or split not in splits:
            asked = f"dataset.split is {split!r}, but it has" if split else "dataset.split must name one of its splits:"
            raise InputError(f"data_path {folder}: {asked} {', '.join(splits)}")
        folder = folder / split
    state = msgspec.json.decode((folder / "state.json").read_bytes())
    if state.get("_indices_data_files"):
        raise InputError(
            f"data_path {folder}: its rows are a selection that was saved by index. Save it again after `.flatten_indices()`"
        )
    return [folder / Path(f["filename"]).name for f in state["_data_files"]]
