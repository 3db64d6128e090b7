"""The store on disk: Arrow files that `datasets.load_from_disk` opens, and a manifest that says what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from llava_tune.constants import IMAGE_TOKEN_INDEX
from llava_tune.data.arrow import numbers, strings
from llava_tune.data.sources import Source
from llava_tune.data.tokens.layout import TokenizedBatch
from llava_tune.errors import InputError
from llava_tune.paths import sync, whole_file, write_whole

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 2
MANIFEST = "llava_tune_manifest.json"
LEFT_OUT = "left_out.jsonl"
PARTS = "parts"

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("image", pa.list_(pa.string())),
        ("length", pa.int32()),
    ]
)
_FEATURES = {
    "id": {"dtype": "string", "_type": "Value"},
    "input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "labels": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "image": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "length": {"dtype": "int32", "_type": "Value"},
}


@dataclass(frozen=True)
class StoreSpec:
    """What a store was made with; a run that differs in any of it can't use the store."""

    tokenizer: str
    template: str
    template_hash: str
    max_length: int
    image_tokens: int
    image_position: str

    FIELDS = {  # noqa: RUF012
        "tokenizer": "model.llm.tokenizer",
        "template": "dataset.template",
        "template_hash": "the definition of dataset.template",
        "max_length": "dataset.max_length",
        "image_tokens": "tokens an image, from model.vision",
        "image_position": "dataset.image_position",
    }


def to_arrow(batch: TokenizedBatch) -> pa.RecordBatch:
    """A record batch that shares the arrays' memory."""
    offsets = numbers(batch.offsets.astype(np.int32))
    return pa.RecordBatch.from_arrays(
        [
            strings(batch.ids, pa.string()),
            pa.ListArray.from_arrays(offsets, numbers(batch.input_ids)),
            pa.ListArray.from_arrays(offsets, numbers(batch.labels)),
            _lists(batch.images),
            numbers(batch.lengths),
        ],
        schema=SCHEMA,
    )


def _lists(rows: list[list[str]]) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, rows), np.int32, len(rows)), out=offsets[1:])
    return pa.ListArray.from_arrays(numbers(offsets), strings(list(chain.from_iterable(rows)), pa.string()))


def part_name(index: int) -> str:
    """File name of part `index`."""
    return f"data-{index:05d}.arrow"


@contextmanager
def part_writer(folder: Path, index: int) -> Iterator[Any]:
    """Write one Arrow stream file; it is there, whole, when the block ends without an error.

    Its content is synced before it gets its name. Whether the name outlives a crash of the machine doesn't matter: a part that
    is missing is written again, and the manifest syncs the folder.
    """
    with whole_file(folder / part_name(index), durable=False) as beside:
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            yield writer
        sync(beside)


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any], files: list[str]) -> None:
    """Make `folder` a store: what `datasets` needs, then the manifest as the last file."""
    content = json.dumps(manifest, indent=1, sort_keys=True)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": xxhash.xxh3_64(content.encode()).hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": _FEATURES, "homepage": "", "license": ""}
    write_whole(folder / "dataset_info.json", json.dumps(info, indent=1))
    write_whole(folder / "state.json", json.dumps(state, indent=1))
    write_whole(folder / MANIFEST, content)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished store.

    Raises:
        InputError: no such folder, no manifest (not finished, or not made by llava-tune), or a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. `llava-tune prepare CFG --save-folder {folder}` makes it")
        if (folder / PARTS).is_dir():
            raise InputError(
                f"{folder}: preparing it has not finished. Run the same `llava-tune prepare` again: it goes on"
            )
        raise InputError(f"{folder}: holds no {MANIFEST}: not a folder that `llava-tune prepare` wrote")
    manifest = json.loads(path.read_bytes())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder}: store format {manifest.get('format_version')!r}, this version reads {FORMAT_VERSION}; prepare it again"
        )
    return dict(manifest)


def check_spec(folder: Path, manifest: dict[str, Any], spec: StoreSpec) -> None:
    """
    Raises:
        InputError: the store was made with other settings; names each field with both values.
    """
    found, expected = manifest["spec"], asdict(spec)
    differing = [f for f in StoreSpec.FIELDS if found.get(f) != expected[f]]
    if not differing:
        return
    lines = [f"{StoreSpec.FIELDS[f]}: the store has {found.get(f)}, the config says {expected[f]}" for f in differing]
    raise InputError(
        f"the store {folder} was made with other settings. {'; '.join(lines)}. Prepare again into another folder, or set the "
        "config to what the store has"
    )


def check_source(folder: Path, manifest: dict[str, Any], source: Source) -> None:
    """Compare a source file with what the store was made from: size, then time, then content.

    Raises:
        InputError: the content differs.
    """
    known = next((s for s in manifest["sources"] if s["name"] == source.path.name), None)
    if known is None:
        return
    if source.bytes == known["bytes"]:
        if source.mtime_ns == known["mtime_ns"]:
            return
        for _ in source.spans():
            pass
        if source.digest() == known["xxh3"]:
            return
    raise InputError(
        f"{source.path} has changed since the store {folder} was made from it ({known['bytes']:,} bytes then, {source.bytes:,} "
        "now). Prepare again into another folder, or leave out dataset.data_path to use the store as it is"
    )


class StoreRows:
    """The rows of a finished store by memory map: nothing is read but what is asked for, and ranks share the pages.

    Raises:
        InputError: see `check_files`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = check_files(folder)
        self._batches: list[pa.RecordBatch] = []
        for part in manifest["parts"]:
            with pa.ipc.open_stream(pa.memory_map(str(folder / part["file"]))) as reader:
                self._batches += reader
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreRows, (self.folder,)  # another process maps the files itself

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: id, input_ids and labels (int32 arrays), image (a list of references), length."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        k = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch, at = self._batches[k], int(index - self._starts[k])
        ids, labels = (batch.column(name)[at].values.to_numpy() for name in ("input_ids", "labels"))
        rest = {name: batch.column(name)[at].as_py() for name in ("id", "image", "length")}
        return {"input_ids": ids, "labels": labels, **rest}

    def lengths(self) -> np.ndarray:
        """The `length` column, int32 [samples], without a walk over the rows."""
        columns = [batch.column("length").to_numpy() for batch in self._batches]
        return np.concatenate(columns) if columns else np.zeros(0, np.int32)


def check_files(folder: Path) -> dict[str, Any]:
    """The manifest of a store whose files are all there.

    Raises:
        InputError: see `read_manifest`; or a file is missing or of another size.
    """
    manifest = read_manifest(folder)
    for part in manifest["parts"]:
        path = folder / part["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != part["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise InputError(
                f"{path} {found}; the manifest says {part['bytes']:,} bytes. Copy the store again or prepare it again"
            )
    return manifest


def open_store(folder: Path) -> datasets.Dataset:
    """The store as a Hugging Face dataset.

    Raises:
        InputError: see `check_files`.
    """
    check_files(folder)
    import datasets

    return datasets.load_from_disk(str(folder))


def images_of(value: Any) -> list[str]:
    """An `image` cell as a list: ours is one; XTuner's is a path, or nothing."""
    return value if isinstance(value, list) else [value] if value else []


def open_foreign(folder: Path, image_tokens: int) -> tuple[datasets.Dataset, np.ndarray, dict[str, Any]]:
    """A folder that another program (XTuner's process_untokenized_llava_data.py) tokenized: its rows, the samples' lengths (int32,
    each image counted as `image_tokens`), and a manifest of what was found.

    Nothing says with which tokenizer or template it was made; only its columns and ids are checked.

    Raises:
        InputError: it can't be opened, a column is missing or of another type, or ids and labels don't agree.
    """
    import datasets

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    try:
        rows: Any = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: `datasets.load_from_disk` can't open it: {error}") from error
    if not isinstance(rows, datasets.Dataset):
        raise InputError(f"{folder}: holds several splits ({', '.join(rows)}); name the folder of one of them")
    columns = {name: rows.data.column(name) for name in ("input_ids", "labels") if name in rows.column_names}
    for name in ("input_ids", "labels"):
        kind = columns[name].type if name in columns else None
        if kind is None or not (pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)):
            raise InputError(
                f"{folder}: expected a column {name!r} of lists of integers, found {kind or 'none'}; it has "
                f"{', '.join(rows.column_names)}"
            )
    lengths, images = _foreign_lengths(folder, columns["input_ids"], columns["labels"])
    listed = rows.data.column("image") if "image" in rows.column_names else None
    named = sum(len(images_of(v)) for v in listed.to_pylist()) if listed is not None else 0
    if named != int(images.sum()):
        raise InputError(
            f"{folder}: input_ids hold {int(images.sum()):,} image placeholders ({IMAGE_TOKEN_INDEX}), the column 'image' names "
            f"{named:,} images. It can't be trained on; prepare it again with `llava-tune prepare`"
        )
    if listed is None:
        rows = rows.add_column("image", pa.nulls(len(rows), pa.string()))
    if "id" not in rows.column_names:
        rows = rows.add_column("id", pa.array([f"row {i}" for i in range(len(rows))]))
    data = {"name": folder.name, "samples": len(rows), "images": named}
    manifest = {
        "spec": None,
        "sources": [{"name": str(folder.resolve())}],
        "data_sets": [data],
        "samples": len(rows),
        "images": named,
    }
    return rows, (lengths + images * (image_tokens - 1)).astype(np.int32), manifest


def _foreign_lengths(folder: Path, input_ids: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ids, image placeholders) of each row, int64, from the columns' buffers."""
    lengths, images = [], []
    for ids, targets in zip(input_ids.chunks, labels.chunks, strict=True):
        if not ids.value_lengths().equals(targets.value_lengths()):
            raise InputError(
                f"{folder}: input_ids and labels differ in length. Prepare it again with `llava-tune prepare`"
            )
        counts = ids.value_lengths().to_numpy(zero_copy_only=False)
        is_image = ids.flatten().to_numpy() == IMAGE_TOKEN_INDEX
        before = np.concatenate([[0], np.cumsum(is_image)])
        ends = np.concatenate([[0], np.cumsum(counts)])
        lengths.append(counts)
        images.append(np.diff(before[ends]))
    return np.concatenate(lengths), np.concatenate(images)
