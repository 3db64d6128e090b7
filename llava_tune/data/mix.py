"""How the data sets of a store come together in an epoch, and where the images of each are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_tune.config import Dataset, DataSource
from llava_tune.data.order import Share
from llava_tune.data.splits import split_rows
from llava_tune.errors import InputError

_HOLDS_IMAGES = frozenset({".tar", ".parquet", ".arrow"})


def shares(config: Dataset, manifest: dict[str, Any]) -> list[Share]:
    """What an epoch takes of each data set of a store.

    Raises:
        InputError: a split leaves no sample, or a share none.
    """
    sources = _matching(config, manifest)
    found: list[Share] = []
    start = 0
    ranges = []
    for data, source in zip(manifest["data_sets"], sources, strict=True):
        rows = split_rows(source.split if source else None, data["samples"])
        ranges.append(range(start + rows.start, start + rows.stop))
        start += data["samples"]
    total = sum(map(len, ranges))
    for rows, source in zip(ranges, sources, strict=True):
        count = len(rows)
        if source and source.share is not None:
            count = round(source.share * total)
        elif source and source.repeat is not None:
            count = round(source.repeat * len(rows))
        if count < 1:
            raise InputError(
                f"dataset.sources {source.name or source.data_path}: its share or repeat of {len(rows):,} samples is none"
                if source
                else "the store holds no sample"
            )
        found.append(Share(rows.start, rows.stop, count))
    return found


def image_folders(config: Dataset, manifest: dict[str, Any]) -> list[Path | None]:
    """What the image paths of each data set start from; files that hold their images themselves have their own folder."""
    return [_image_folder(source, config) for source in _matching(config, manifest)]


def _image_folder(source: DataSource | None, config: Dataset) -> Path | None:
    given = source.image_folder if source else config.image_folder
    if given is not None or source is None:
        return Path(given) if given is not None else None
    path = Path(source.data_path)
    if path.is_dir():
        return path / source.split.split("[")[0] if source.split and (path / "dataset_dict.json").is_file() else path
    return path.parent if path.suffix in _HOLDS_IMAGES else None


def _matching(config: Dataset, manifest: dict[str, Any]) -> list[DataSource | None]:
    """The config's data set for each of the store's; None for all where the config names none."""
    sources = config.all_sources()
    known = manifest["data_sets"]
    if not sources:
        return [None] * len(known)
    if len(sources) != len(known):
        raise InputError(
            f"the store was made from {len(known)} data set(s) ({', '.join(d['name'] for d in known)}), the config has {len(sources)}"
        )
    return list(sources)


def describe_mix(manifest: dict[str, Any], taken: Sequence[Share]) -> list[str]:
    """A line for each data set: its samples, and its part of an epoch."""
    total = sum(share.count for share in taken)
    lines = []
    for data, share in zip(manifest["data_sets"], taken, strict=True):
        rows = share.stop - share.start
        lines.append(
            f"{data['name']}: {data['samples']:,} samples, {rows:,} of them in use, {share.count:,} an epoch "
            f"({share.count / rows:.2f} times; {share.count / total:.1%} of the mix)"
        )
    return lines
