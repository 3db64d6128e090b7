"""The vision tower's shape from its open_clip config, without building it (and, for a ViT, without importing torch)."""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

from llava_tune.config import VisionTower
from llava_tune.errors import InputError


def vision_config(vision: VisionTower) -> dict[str, Any]:
    """The open_clip model config ({"embed_dim", "vision_cfg", "quick_gelu", ...}) of a tower.

    Raises:
        InputError: no such model in open_clip and no such file; or OpenAI's weights with the wrong activation.
    """
    config = _read(Path(vision.name) if vision.name.endswith(".json") else _shipped(vision.name))
    _check_quick_gelu(vision, config)
    return config


def image_size(config: dict[str, Any]) -> int:
    """Side of the square image that the tower takes, in pixels."""
    size = config["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _shipped(name: str) -> Path:
    spec = importlib.util.find_spec("open_clip")  # finds the folder; importing open_clip takes seconds
    if spec is None or spec.origin is None:
        raise InputError("open_clip_torch is not installed. Run: pip install open_clip_torch")
    folder = Path(spec.origin).parent / "model_configs"
    path = folder / f"{name.replace('/', '-')}.json"
    if not path.is_file():
        names = [p.stem for p in folder.glob("*.json")]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        raise InputError(
            f"model.vision.name {name!r}: open_clip has no model of that name and it is no .json file. "
            f"Near names: {', '.join(close) or 'none'}"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"model.vision.name {path}: no such file. Expected open_clip's model config as JSON")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"model.vision.name {path}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg"} <= set(config):
        raise InputError(
            f"model.vision.name {path}: expected open_clip's model config with 'embed_dim' and 'vision_cfg'"
        )
    return config


def _check_quick_gelu(vision: VisionTower, config: dict[str, Any]) -> None:
    """OpenAI's weights were trained with quick-GELU; open_clip builds the plain name with GELU and only warns."""
    if vision.pretrained == "openai" and not config.get("quick_gelu", False):
        raise InputError(
            f"model.vision: OpenAI's weights were trained with quick-GELU, but {vision.name} is built with GELU and would give "
            f"wrong features. Set name to {vision.name}-quickgelu"
        )
