"""Train LLaVA models on data prepared once. The public names below are imported on first use (torch is slow)."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "build_llava": "llava_tune.model",
    "load_checkpoint": "llava_tune.model",
    "LlavaDataset": "llava_tune.data",
    "prepare": "llava_tune.data",
    "train": "llava_tune.train",
    "evaluate": "llava_tune.evaluate",
    "load_run": "llava_tune.config",
    "Run": "llava_tune.config",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llava_tune' has no attribute {name!r}")
