"""Source files of every kind, cut into spans of whole records that any process can read for itself."""

from __future__ import annotations

import glob
from pathlib import Path

from llava_tune.data.sources.base import BadRow, Chunk, Source, Span
from llava_tune.data.sources.text import COMPRESSIONS, TextSource
from llava_tune.errors import InputError

__all__ = ["BadRow", "Chunk", "Source", "Span", "open_source", "open_sources"]

_TEXT = frozenset({".json", ".jsonl", ".ndjson"})
_KINDS = "JSON, JSONL (also .gz, .zst), Parquet, a folder saved by `datasets`, or WebDataset .tar files"


def open_source(path: Path) -> Source:
    """One file, by what it is.

    Raises:
        InputError: missing, empty, broken, or none of the kinds.
    """
    if not path.is_file():
        raise InputError(f"data_path {path}: no such file. Expected {_KINDS}")
    with path.open("rb") as file:
        magic = file.read(8)
    if magic[:4] == b"PAR1":
        from llava_tune.data.sources.tables import ParquetSource

        return ParquetSource(path)
    if path.suffix == ".arrow":
        from llava_tune.data.sources.tables import ArrowSource

        return ArrowSource(path)
    if path.suffix == ".tar":
        from llava_tune.data.sources.tar import TarSource

        return TarSource(path)
    if path.suffix == ".parquet" and magic:
        raise InputError(f"data_path {path}: not a Parquet file (it starts with {magic!r}). Copy or download it again")
    return TextSource(path)


def open_sources(data_path: str, split: str | None = None) -> list[Source]:
    """The files of a data path, in the order of their names: one file, a folder of files or one that `datasets` saved, or a
    pattern (`shards/*.jsonl.gz`).

    Raises:
        InputError: see `open_source`; or a folder or pattern holds no data file; or a split doesn't exist.
    """
    path = Path(data_path)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            from llava_tune.data.sources.tables import saved_files

            return [open_source(file) for file in saved_files(path, split)]
        files = sorted(p for p in path.iterdir() if p.is_file() and _is_data(p))
        if not files:
            raise InputError(f"data_path {path}: the folder holds no data file. Expected {_KINDS}")
        return [open_source(file) for file in files]
    if not path.exists() and glob.has_magic(data_path):
        matching = sorted(glob.glob(data_path))  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not matching:
            raise InputError(f"data_path {data_path}: no file matches the pattern")
        return [open_source(Path(file)) for file in matching]
    return [open_source(path)]


def _is_data(path: Path) -> bool:
    suffixes = path.suffixes
    if not suffixes or path.name.startswith("."):
        return False
    if suffixes[-1] in COMPRESSIONS:
        return len(suffixes) > 1 and suffixes[-2] in _TEXT
    return suffixes[-1] in _TEXT or suffixes[-1] in (".parquet", ".tar")
