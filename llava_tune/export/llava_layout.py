"""A checkpoint in the layout of LLaVA's own repository (github.com/haotian-liu/LLaVA): LlavaLlamaForCausalLM and its vision tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_tune.errors import InputError
from llava_tune.evaluate.answer import Answerer
from llava_tune.export.hf import image_processor, save_weights, write_tokenizer
from llava_tune.export.weights import is_linear, language_weights, projector_weights, vision_config_of, vision_weights

TOWER = "vision_tower"


def write_llava(answerer: Answerer, folder: Path, final: Path, dtype: torch.dtype) -> None:
    """Fill a folder with config, weights, tokenizer and the vision tower in a folder of its own. Adapters must be merged before.

    Args:
        final: where the folder will lie: LLaVA's code finds the tower by an absolute path.

    Raises:
        InputError: the model is none that LLaVA's code knows.
    """
    llava = answerer.llava
    if llava.vision is None or llava.projector is None:
        raise InputError("the model has no vision tower, and LLaVA's layout is of one. Use --format hf")
    if llava.config.model_type != "llama":
        raise InputError(
            f"the language model is a {llava.config.model_type}; LLaVA's layout is written for Llama and InternLM2. "
            "Use --format hf"
        )
    tower_config = vision_config_of(llava.vision, answerer.transform.size)
    if llava.vision.is_timm:
        raise InputError("the vision tower is a SigLIP, and LLaVA's code knows CLIP's only. Use --format hf")
    config = json.loads(llava.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "quantization_config"):
        config.pop(name, None)
    config |= {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "pretraining_tp": 1,
        "mm_vision_tower": str(final.resolve() / TOWER),
        "mm_hidden_size": tower_config.hidden_size,
        "mm_projector_type": "linear" if is_linear(llava.projector) else "mlp2x_gelu",
        "mm_vision_select_layer": -1,  # the layers behind it are not kept
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if answerer.transform.pad_to_square else "square",
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "use_cache": True,
        "eos_token_id": answerer.layout.stop_ids,
        "rope_theta": (config.get("rope_parameters") or {}).get(
            "rope_theta", 10000.0
        ),  # where LLaVA's transformers looks
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = language_weights(llava, llava.config.vocab_size)
    weights |= _projector(llava.projector, llava.config.hidden_size)
    save_weights(weights, folder, dtype)
    write_tokenizer(answerer, folder, None, adds_bos=True)  # LLaVA's tokenizer_image_token counts on it
    tower = folder / TOWER
    tower.mkdir()
    tower_config.architectures = ["CLIPVisionModel"]
    tower_config.dtype = dtype
    tower_config.save_pretrained(tower)
    save_weights({f"vision_model.{n}": w for n, w in vision_weights(llava.vision, tower_config)}, tower, dtype)
    plain = image_processor(answerer.transform) | {"image_processor_type": "CLIPImageProcessor"}
    plain.pop("do_pad", None)  # LLaVA's code pads by itself
    (tower / "preprocessor_config.json").write_text(json.dumps(plain, indent=1))
    (folder / "README.md").write_text(_CARD)


def _projector(projector: nn.Module, width: int) -> dict[str, Any]:
    """Under the names of LLaVA's `build_vision_projector`: a linear layer, or a sequence with a GELU at 1."""
    weights = projector_weights(projector, width)
    if is_linear(projector):
        return {f"model.mm_projector.{end}": weights[f"linear_1.{end}"] for end in ("weight", "bias")}
    places = {"linear_1": 0, "linear_2": 2}
    return {f"model.mm_projector.{places[n.split('.')[0]]}.{n.split('.')[1]}": w for n, w in weights.items()}


_CARD = f"""# In the layout of LLaVA's own code

`llava.model.LlavaLlamaForCausalLM.from_pretrained(FOLDER)` opens it. The vision tower lies in `{TOWER}/`; its absolute path is in config.json
(`mm_vision_tower`): change it when you move the folder. `gate.json` says how this was compared with the model it was made from.
"""
