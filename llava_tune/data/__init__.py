"""Data: records, templates, tokenizing, the store, images, dataset, order, batches."""

from llava_tune.data.batch import Collator
from llava_tune.data.dataset import LlavaDataset, TokenizedSample
from llava_tune.data.images import BadImage, ImageTransform
from llava_tune.data.prepare import Prepared, prepare
from llava_tune.data.records import Record
from llava_tune.data.store import open_store, read_manifest

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
