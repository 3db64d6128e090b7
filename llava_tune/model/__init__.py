"""The model: vision tower, projector, language model, and the factory that puts them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_tune.model.factory import build_llava, load_checkpoint
    from llava_tune.model.llava import Llava

__all__ = ["Llava", "build_llava", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    # model.shape is used by `prepare`, which does without torch
    if name in ("build_llava", "load_checkpoint"):
        from llava_tune.model import factory

        return getattr(factory, name)
    if name == "Llava":
        from llava_tune.model.llava import Llava

        return Llava
    raise AttributeError(f"module 'llava_tune.model' has no attribute {name!r}")
