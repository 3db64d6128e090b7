"""The vision tower: the image half of a model that open_clip builds, cut after the layer whose features are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava_tune.config import VisionTower
from llava_tune.errors import InputError
from llava_tune.hub import from_hub
from llava_tune.model.shape import image_size, vision_config


class VisionEncoder(nn.Module):
    """Patch features of images.

    forward: float [images, 3, size, size] to float [images, tokens, dim], without the class token. Layers behind the
    feature layer are not kept, so every weight here gets a gradient.
    """

    def __init__(self, visual: nn.Module, is_timm: bool, feature_layer: int, size: int) -> None:
        super().__init__()
        self.visual: Any = visual
        self.is_timm = is_timm
        self.input_size = size
        body = visual.trunk if is_timm else visual
        self._prune(body, feature_layer)
        with torch.no_grad():
            device = next(visual.parameters()).device
            shape = self(torch.zeros(1, 3, size, size, device=device)).shape
        self.tokens, self.dim = int(shape[1]), int(shape[2])

    def _prune(self, body: Any, feature_layer: int) -> None:
        try:
            body.prune_intermediate_layers([feature_layer], prune_norm=True, prune_head=True)
        except (AssertionError, IndexError, ValueError) as error:
            raise InputError(
                f"model.vision.feature_layer {feature_layer}: the tower has no such layer ({error})"
            ) from error
        if self.is_timm:
            self.visual.head = nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        output = self.visual.forward_intermediates(
            pixel_values,
            indices=[-1],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW" if self.is_timm else "NLC",
        )
        features: Tensor = output["image_intermediates"][0]
        return features.flatten(2).transpose(1, 2) if self.is_timm else features


def _build_visual(config: dict[str, Any]) -> nn.Module:
    import open_clip.model

    cfg = open_clip.model.CLIPVisionCfg(**config["vision_cfg"])
    visual: Any = open_clip.model._build_vision_tower(config["embed_dim"], cfg, config.get("quick_gelu", False))
    if cfg.timm_model_name and hasattr(visual.trunk, "set_input_size"):
        visual.trunk.set_input_size(visual.image_size)
    return cast(nn.Module, visual)


def build_vision(vision: VisionTower) -> VisionEncoder:
    """The tower with its weights, in fp32 on the CPU.

    Raises:
        InputError: no such model, no such weights, or weights of another shape or activation.
    """
    config = vision_config(vision)
    visual = _build_visual(config)
    if vision.pretrained is not None:
        _load(visual, vision, config)
    return VisionEncoder(
        visual, bool(config["vision_cfg"].get("timm_model_name")), vision.feature_layer, image_size(config)
    )


def count_tokens(vision: VisionTower) -> int:
    """Tokens an image, by building the tower with random weights (for timm's models, whose shape no config states)."""
    config = vision_config(vision)
    return VisionEncoder(_build_visual(config), True, vision.feature_layer, image_size(config)).tokens


def _load(visual: nn.Module, vision: VisionTower, config: dict[str, Any]) -> None:
    source = str(vision.pretrained)
    folder = Path(source)
    if (folder / "config.json").is_file() and _model_type(folder) in ("clip", "clip_vision_model"):
        state = _from_hugging_face(folder, vision, config)
    elif "/" in source and not folder.exists() and not source.startswith((".", "/")):
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        with from_hub(f"model.vision.pretrained {source}", source):
            folder = Path(snapshot_download(source, allow_patterns=patterns))
        state = _from_hugging_face(folder, vision, config)
    else:
        state = _from_open_clip(vision)
    state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")} or state
    try:
        visual.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).split("\n")[1:4])
        raise InputError(f"model.vision.pretrained {source} doesn't fit {vision.name}: {reason}") from error


def _from_open_clip(vision: VisionTower) -> dict[str, Tensor]:
    import open_clip
    from open_clip.factory import load_state_dict

    tag = str(vision.pretrained)
    path = Path(tag)
    if not path.is_file():
        known = open_clip.list_pretrained_tags_by_model(vision.name)
        if tag not in known:
            raise InputError(
                f"model.vision.pretrained {tag!r}: no such file, no Hugging Face CLIP folder, and no open_clip tag of "
                f"{vision.name}. Its tags: {', '.join(known) or 'none'}"
            )
        weights = open_clip.get_pretrained_cfg(vision.name, tag)
        with from_hub(f"model.vision.pretrained {tag!r} of {vision.name}", str(weights.get("hf_hub")).rstrip("/")):
            path = Path(open_clip.download_pretrained(weights))
    return cast(dict[str, Tensor], load_state_dict(str(path), weights_only=True))


def _model_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text()).get("model_type", ""))


def _from_hugging_face(folder: Path, vision: VisionTower, config: dict[str, Any]) -> dict[str, Tensor]:
    """open_clip's names for the vision weights of a transformers CLIP folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    hf = CLIPVisionConfig.from_pretrained(folder)
    if (hf.hidden_act == "quick_gelu") != bool(config.get("quick_gelu", False)):
        raise InputError(
            f"model.vision: the weights in {folder} use {hf.hidden_act}, but {vision.name} is built with "
            f"{'quick_gelu' if config.get('quick_gelu') else 'gelu'}. Choose the architecture "
            f"{'with' if hf.hidden_act == 'quick_gelu' else 'without'} -quickgelu"
        )
    cfg = config["vision_cfg"]
    shape = (hf.image_size, hf.patch_size, hf.hidden_size, hf.num_hidden_layers)
    expected = (cfg.get("image_size", 224), cfg.get("patch_size", 16), cfg.get("width", 768), cfg.get("layers", 12))
    if shape != expected:
        raise InputError(
            f"model.vision: {vision.name} has (image_size, patch_size, width, layers) {expected}, the weights in {folder} "
            f"have {shape}"
        )
    theirs = {
        k.removeprefix("vision_model."): v for k, v in CLIPVisionModel.from_pretrained(folder).state_dict().items()
    }
    return rename_clip(theirs, hf.num_hidden_layers, cfg.get("width", 768), config["embed_dim"])


_BLOCK_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def rename_clip(theirs: dict[str, Tensor], layers: int, width: int, embed_dim: int) -> dict[str, Tensor]:
    """transformers' CLIPVisionModel weights under open_clip's names; `proj`, which is not among them, is zero."""
    ours = {
        "class_embedding": theirs["embeddings.class_embedding"],
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
        "conv1.weight": theirs["embeddings.patch_embedding.weight"],
        "proj": torch.zeros(width, embed_dim),
    }
    for end in ("weight", "bias"):
        ours[f"ln_pre.{end}"] = theirs[f"pre_layrnorm.{end}"]
        ours[f"ln_post.{end}"] = theirs[f"post_layernorm.{end}"]
        for i in range(layers):
            block, to = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            qkv = [theirs[f"{block}.self_attn.{x}_proj.{end}"] for x in "qkv"]
            ours[f"{to}.attn.in_proj_{end}"] = torch.cat(qkv)
            for name, renamed in _BLOCK_NAMES.items():
                ours[f"{to}.{renamed}.{end}"] = theirs[f"{block}.{name}.{end}"]
    return ours
