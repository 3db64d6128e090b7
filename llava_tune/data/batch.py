"""Samples to a batch: placeholders become patches, rows are padded on the right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava_tune.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_tune.data.dataset import TokenizedSample

if TYPE_CHECKING:
    from torch import Tensor


def expand(input_ids: np.ndarray, image_tokens: int) -> np.ndarray:
    """How often each token is repeated: image_tokens for a placeholder, else once; int64 [tokens]."""
    return np.where(input_ids == IMAGE_TOKEN_INDEX, image_tokens, 1)


@dataclass(frozen=True)
class Collator:
    """Makes a Batch of samples.

    Args:
        image_tokens: patches an image.
        image_size: side of an image, for the blank one that a batch without images carries; 0: the model takes none.
        pad_id: what fills rows up; it is never looked at.
    """

    image_tokens: int
    image_size: int
    pad_id: int = 0

    def __call__(self, samples: list[TokenizedSample]) -> dict[str, Tensor]:
        """
        Returns:
            input_ids, labels, position_ids: int64 [batch, length]. A padding token has position 0, so that it is a sample
            of its own that nothing sees.
            pixel_values: float32 [images, 3, size, size]; one blank image if the batch has none, so that every rank runs
            the tower.
        """
        import torch

        rows = []
        for sample in samples:
            times = expand(sample.input_ids, self.image_tokens)
            labels = np.repeat(sample.labels, times)
            labels[0] = IGNORE_INDEX
            rows.append((np.repeat(sample.input_ids, times), labels))
        length = max(len(ids) for ids, _ in rows)
        shape = (len(rows), length)
        input_ids = np.full(shape, self.pad_id, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        position_ids = np.zeros(shape, np.int64)
        for i, (ids, row_labels) in enumerate(rows):
            n = len(ids)
            input_ids[i, :n], labels[i, :n], position_ids[i, :n] = ids, row_labels, np.arange(n)
        pixels = [p for s in samples for p in s.pixel_values]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }
        if self.image_size:
            blank = torch.zeros(1, 3, self.image_size, self.image_size)
            batch["pixel_values"] = torch.stack(pixels) if pixels else blank
        return batch
