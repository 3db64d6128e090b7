"""Samples to a batch: placeholders become patches, rows are padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

    def __call__(self, rows_of_samples: Sequence[TokenizedSample | list[TokenizedSample]]) -> dict[str, Tensor]:
        """
        Args:
            rows_of_samples: what makes each row: a sample, or the samples that are packed into it.

        Returns:
            input_ids, labels, position_ids: int64 [batch, length]. Positions start anew with each sample, whose first token
            has no label, so that samples of a row don't see each other. A padding token has position 0: it is a sample of its
            own that nothing sees.
            pixel_values: float32 [images, 3, size, size]; one blank image if the batch has none, so that every rank runs
            the tower.
        """
        import torch

        packs = [row if isinstance(row, list) else [row] for row in rows_of_samples]
        rows = [self._row(samples) for samples in packs]
        length = max(len(ids) for ids, _, _ in rows)
        shape = (len(rows), length)
        input_ids = np.full(shape, self.pad_id, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        position_ids = np.zeros(shape, np.int64)
        for i, (ids, row_labels, positions) in enumerate(rows):
            n = len(ids)
            input_ids[i, :n], labels[i, :n], position_ids[i, :n] = ids, row_labels, positions
        pixels = [p for samples in packs for s in samples for p in s.pixel_values]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }
        if self.image_size:
            blank = torch.zeros(1, 3, self.image_size, self.image_size)
            batch["pixel_values"] = torch.stack(pixels) if pixels else blank
        return batch

    def _row(self, samples: list[TokenizedSample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, labels and positions of samples behind one another."""
        ids, labels, positions = [], [], []
        for sample in samples:
            times = expand(sample.input_ids, self.image_tokens)
            ids.append(np.repeat(sample.input_ids, times))
            labels.append(np.repeat(sample.labels, times))
            labels[-1][0] = IGNORE_INDEX
            positions.append(np.arange(len(ids[-1])))
        return np.concatenate(ids), np.concatenate(labels), np.concatenate(positions)


@dataclass(frozen=True)
class IdCollator(Collator):
    """A Collator whose batches name their records, too: "ids", a list of str, in order."""

    def __call__(self, rows_of_samples: Sequence[TokenizedSample | list[TokenizedSample]]) -> dict[str, Any]:
        samples = [s for row in rows_of_samples for s in (row if isinstance(row, list) else [row])]
        return {**super().__call__(rows_of_samples), "ids": [s.id for s in samples]}
