"""A checkpoint as transformers' LlavaForConditionalGeneration: weights, tokenizer, chat template, processor, model card."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_tune import __version__
from llava_tune.data.images import ImageTransform
from llava_tune.errors import InputError
from llava_tune.evaluate.answer import Answerer
from llava_tune.export.chat_template import jinja
from llava_tune.export.weights import language_weights, projector_weights, vision_config_of, vision_weights

IMAGE_TOKEN = "<image>"
_ROWS = 64
"""The vocabulary is filled up to a multiple of this, as GPUs like it."""


def write_hf(answerer: Answerer, folder: Path, dtype: torch.dtype) -> None:
    """Fill a folder with everything that AutoModelForImageTextToText and AutoProcessor open.

    Raises:
        InputError: a part of the model has no equal in transformers.
    """
    llava, run = answerer.llava, answerer.run
    if llava.vision is None or llava.projector is None:
        raise InputError("the checkpoint is a language model alone (model.vision is None): there is no LLaVA to export")
    vision_config = vision_config_of(llava.vision, answerer.transform.size)
    tokenizer, image_id = _tokenizer(answerer, folder)
    rows = max(llava.config.vocab_size, -(-len(tokenizer) // _ROWS) * _ROWS)
    text_config = copy.deepcopy(llava.config)
    text_config.vocab_size = rows
    text_config._attn_implementation = None
    text_config.dtype = dtype
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    text_config.architectures = None
    stop = answerer.layout.stop_ids
    _write_config(folder, vision_config, text_config, image_id, dtype, llava.vision.is_timm)
    _write_weights(answerer, folder, vision_config, rows, dtype)
    _write_processor(answerer, folder, vision_config, tokenizer)
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0],
        "suppress_tokens": [image_id],
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    (folder / "README.md").write_text(model_card(run, dtype))


def _tokenizer(answerer: Answerer, folder: Path) -> tuple[Any, int]:
    """The tokenizer with an image token, adding no BOS itself: the chat template writes it."""
    tokenizer = copy.deepcopy(answerer.tokenizer)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    spec = answerer.layout.spec
    bos = tokenizer.convert_ids_to_tokens(spec.bos) if spec.bos is not None else None
    tokenizer.chat_template = jinja(spec.template, bos, IMAGE_TOKEN)
    for name in ("add_bos_token", "add_eos_token"):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, False)
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.save_pretrained(folder)
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    backend["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("is_local", "local_files_only"):  # of this machine
        config.pop(name, None)
    config |= {"image_token": IMAGE_TOKEN, "add_bos_token": False, "add_eos_token": False}
    path.write_text(json.dumps(config, indent=1, ensure_ascii=False))
    return tokenizer, image_id


def _write_config(
    folder: Path, vision_config: Any, text_config: Any, image_id: int, dtype: torch.dtype, no_class_token: bool
) -> None:
    from transformers import LlavaConfig

    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full" if no_class_token else "default",
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = dtype
    config.save_pretrained(folder)


def _write_weights(answerer: Answerer, folder: Path, vision_config: Any, rows: int, dtype: torch.dtype) -> None:
    from huggingface_hub import save_torch_state_dict

    llava = answerer.llava
    assert llava.vision is not None and llava.projector is not None
    width = llava.config.hidden_size
    state: dict[str, Tensor] = {}
    state |= {f"vision_tower.vision_model.{n}": w for n, w in vision_weights(llava.vision, vision_config)}
    state |= {f"multi_modal_projector.{n}": w for n, w in projector_weights(llava.projector, width).items()}
    state |= {f"language_model.{n}": w for n, w in language_weights(llava, rows).items()}
    state = {name: value.to("cpu", dtype).contiguous().clone() for name, value in state.items()}
    if len([m for m in llava.projector if isinstance(m, torch.nn.Linear)]) == 1:  # type: ignore[attr-defined]
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "projector_hidden_act": "linear"}, indent=2))
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})


def _write_processor(answerer: Answerer, folder: Path, vision_config: Any, tokenizer: Any) -> None:
    """LlavaProcessor with the preprocessing that the model was trained with."""
    assert answerer.llava.vision is not None
    no_class_token = answerer.llava.vision.is_timm
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision_config.patch_size,
        "vision_feature_select_strategy": "full" if no_class_token else "default",
        "num_additional_image_tokens": 0 if no_class_token else 1,
        "image_processor": image_processor(answerer.transform),
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=1))
    # The same for programs that look for this file (llama.cpp's converter, older transformers).
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor(answerer.transform), indent=1))


def image_processor(transform: ImageTransform) -> dict[str, Any]:
    """An ImageTransform as the settings of transformers' CLIP (or, where it pads, LLaVA) image processor."""
    kind = "LlavaImageProcessor" if transform.pad_to_square else "CLIPImageProcessor"
    return {
        "image_processor_type": kind,
        **({"do_pad": True} if transform.pad_to_square else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": transform.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": transform.size, "width": transform.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def model_card(run: Any, dtype: torch.dtype) -> str:
    """README.md of an export: how it was made, and how to use it."""
    from llava_tune.config import to_json

    vision = run.model.vision.name if run.model.vision else "none"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, llava-tune]
---
# LLaVA trained with llava-tune {__version__}

- Vision tower: {vision}; projector: {run.model.projector.kind}; language model: {run.model.llm.name}
- Chat template: {run.dataset.template}; weights: {str(dtype).removeprefix("torch.")}; adapters merged: {bool(run.model.llm.lora.rank)}

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model=FOLDER)
message = {{"role": "user", "content": [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is this?"}}]}}
print(ask(text=[message], max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

`gate.json` says how this folder was compared with the model it was made from.

## Recipe
```json
{to_json(run)}
```
"""
