"""How many tokens an image gives, without building the tower where its config says it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from typing import Any

from llava_tune.config import VisionTower
from llava_tune.errors import InputError
from llava_tune.model.shape import vision_config
from llava_tune.paths import cache_folder, write_whole


def image_tokens(vision: VisionTower | None) -> int:
    """Patch tokens that one image gives; 0 without a tower.

    Raises:
        InputError: see `vision_config`; or the image size is not a multiple of the patch size.
    """
    if vision is None:
        return 0
    config = vision_config(vision)
    cfg = config["vision_cfg"]
    if cfg.get("timm_model_name"):
        return _count_tokens(vision, config)
    size = cfg.get("image_size", 224)
    patch = cfg.get("patch_size", 16)
    sizes = size if isinstance(size, (list, tuple)) else [size, size]
    patches = patch if isinstance(patch, (list, tuple)) else [patch, patch]
    if isinstance(cfg.get("layers"), (list, tuple)):
        raise InputError(
            f"model.vision.name {vision.name}: a CLIP ResNet has no patch tokens; choose a ViT, such as ViT-L-14-336"
        )
    for s, p in zip(sizes, patches, strict=True):
        if s % p:
            raise InputError(
                f"model.vision {vision.name}: image_size {s} is not a multiple of patch_size {p}, so the patches don't fit. "
                f"Use {s // p * p or p} or {(s // p + 1) * p}"
            )
    return (sizes[0] // patches[0]) * (sizes[1] // patches[1])


def _count_tokens(vision: VisionTower, config: dict[str, Any]) -> int:
    """For timm's models, whose shape no config states: counted by building one, and kept in the cache."""
    key = json.dumps([config, vision.feature_layer, importlib.metadata.version("timm")], sort_keys=True)
    known = cache_folder() / "image_tokens" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if known.is_file():
        return int(known.read_text())
    from llava_tune.model.vision import count_tokens

    tokens = count_tokens(vision)
    write_whole(known, str(tokens))
    return tokens
