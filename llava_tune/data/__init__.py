"""Data: records, templates, tokenizing, the store, images, dataset, order, batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_tune.data.batch import Collator
    from llava_tune.data.dataset import LlavaDataset, TokenizedSample
    from llava_tune.data.images import BadImage, ImageTransform
    from llava_tune.data.preparation import Prepared, prepare
    from llava_tune.data.records import Record
    from llava_tune.data.store import open_store, read_manifest

_HOMES = {
    "BadImage": "images",
    "Collator": "batch",
    "ImageTransform": "images",
    "LlavaDataset": "dataset",
    "Prepared": "preparation",
    "Record": "records",
    "TokenizedSample": "dataset",
    "open_store": "store",
    "prepare": "preparation",
    "read_manifest": "store",
}

__all__ = [
    "BadImage",
    "Collator",
    "ImageTransform",
    "LlavaDataset",
    "Prepared",
    "Record",
    "TokenizedSample",
    "open_store",
    "prepare",
    "read_manifest",
]


def __getattr__(name: str) -> Any:
    """A public name is imported when it is used: `prepare` starts without what training needs."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
