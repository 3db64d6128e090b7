"""Where things are kept, and how a file or folder appears: whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """LLAVA_TUNE_CACHE, else llava_tune/ in the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    if given := os.environ.get("LLAVA_TUNE_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_tune"


def sync(path: Path) -> None:
    """fsync a file or a folder, so that it survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it becomes `path`, on failure it is removed.

    Args:
        durable: also outlive a crash of the machine at once. Otherwise the file may be gone after one; but what is there is
            whole if its content was synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        if durable:
            sync(beside)
        beside.replace(path)
        if durable:
            sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file that is whole or absent (or, if it was there, the old one)."""
    with whole_file(path) as beside:
        beside.write_bytes(data.encode() if isinstance(data, str) else data)


def sync_tree(folder: Path) -> None:
    """fsync every file below a folder, and the folders."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            sync(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path` to fill; on success it becomes `path`, on failure it is removed.

    If another process made `path` in the meantime, that one stays and this one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        sync_tree(beside)
        try:
            beside.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def inside(folder: Path, relative: str) -> Path:
    """`relative` below `folder`, symbolic links followed.

    Raises:
        ValueError: the path is absolute, holds a null byte, or leaves the folder.
    """
    if "\0" in relative:
        raise ValueError("the path holds a null byte")
    if relative.startswith(("/", "\\")):
        raise ValueError("the path is absolute; it must be relative to the image folder")
    path = os.path.realpath(folder / relative)
    root = os.path.realpath(folder)
    if os.path.commonpath([path, root]) != root:
        raise ValueError("the path leaves the image folder")
    return Path(path)
