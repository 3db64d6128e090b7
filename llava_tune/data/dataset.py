"""The training dataset: a store's rows with their images decoded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_tune.constants import IGNORE_INDEX
from llava_tune.data.images import BadImage, ImageTransform
from llava_tune.data.store import StoreRows, images_of, open_foreign, read_manifest
from llava_tune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenizedSample:
    """One sample, ready for a batch.

    Attributes:
        id: the record's.
        input_ids: int32 [tokens], an image is one IMAGE_TOKEN_INDEX.
        labels: int32 [tokens].
        pixel_values: a float32 [3, size, size] for each image.
        bad_image: why an image could not be used; then nothing of the sample is supervised.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    pixel_values: list[Tensor]
    bad_image: str | None = None


class Quarantine:
    """The list of bad images, one JSON object a line; several processes append to one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, identity: str, image: str, reason: str) -> None:
        line = json.dumps({"id": identity, "image": image, "reason": reason}, ensure_ascii=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())  # one write of an appended line is atomic on a local file system
        finally:
            os.close(descriptor)

    def entries(self) -> list[dict[str, str]]:
        """What was found so far, each image once."""
        if not self.path.is_file():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return list({(e["id"], e["image"]): e for e in lines}.values())


class LlavaDataset:
    """A prepared store as a map-style dataset of TokenizedSample.

    Args:
        offline_processed_text_folder: what `llava-tune prepare` wrote.
        image_folder: what the images' paths start from; or one for each data set of the store.
        transform: how images become tensors.
        quarantine: file to list bad images in.
        foreign: take a folder without a manifest (XTuner's), see `open_foreign`; its images take `image_tokens` each.

    Raises:
        InputError: not a finished store, or the store has images and image_folder is missing.
    """

    def __init__(
        self,
        offline_processed_text_folder: str | Path,
        image_folder: str | Path | Sequence[str | Path | None] | None,
        transform: ImageTransform,
        quarantine: Path | None = None,
        *,
        foreign: bool = False,
        image_tokens: int = 1,
    ) -> None:
        folder = Path(offline_processed_text_folder)
        rows: Any
        if foreign:
            rows, self.lengths, self.manifest = open_foreign(folder, image_tokens)
            rows = rows.with_format("numpy", columns=["input_ids", "labels"], output_all_columns=True)
        else:
            self.manifest = read_manifest(folder)
            rows = StoreRows(folder)
            self.lengths = rows.lengths()
        self.rows: Any = rows
        self.transform = transform
        self.quarantine = Quarantine(quarantine) if quarantine else None
        sets = self.manifest["data_sets"]
        one = image_folder is None or isinstance(image_folder, str | Path)
        folders: Any = [image_folder] * len(sets) if one else image_folder
        self._first_rows = np.cumsum([0, *(data["samples"] for data in sets)])[:-1]
        self.image_folders = [Path(f) if f is not None else Path() for f in folders]
        for data, given in zip(sets, folders, strict=True):
            if data["images"] and given is None:
                raise InputError(
                    f"the store {folder} has {data['images']:,} images of {data['name']}, but dataset.image_folder is not set. Set it "
                    "to the folder that the images' paths start from"
                )
            if given is not None and not Path(given).is_dir():
                raise InputError(f"dataset.image_folder {given}: no such folder")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int | tuple[int, ...]) -> TokenizedSample | list[TokenizedSample]:
        """A sample; or the samples of a pack, by their rows."""
        return [self.sample(row) for row in index] if isinstance(index, tuple) else self.sample(index)

    def sample(self, index: int) -> TokenizedSample:
        """The sample of a row, its images decoded."""
        import torch

        row = self.rows[index]
        folder = self.image_folders[int(np.searchsorted(self._first_rows, index, side="right")) - 1]
        input_ids, labels = row["input_ids"], row["labels"]
        pixels: list[Tensor] = []
        bad: str | None = None
        for image in images_of(row["image"]):
            try:
                pixels.append(self.transform.load(folder, image))
            except BadImage as error:
                bad = f"{image}: {error}"
                if self.quarantine:
                    self.quarantine.add(row["id"], image, str(error))
                pixels.append(torch.zeros(3, self.transform.size, self.transform.size))
        if bad is not None:
            labels = np.full_like(labels, IGNORE_INDEX)
        return TokenizedSample(row["id"], input_ids, labels, pixels, bad)
