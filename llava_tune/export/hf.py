"""A checkpoint as transformers' LlavaForConditionalGeneration: weights, tokenizer, chat template, processor, model card."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_tune.data.images import ImageTransform
from llava_tune.evaluate.answer import Answerer
from llava_tune.export.card import model_card
from llava_tune.export.chat_template import jinja, parts_said
from llava_tune.export.weights import is_linear, language_weights, projector_weights, vision_config_of, vision_weights
from llava_tune.model.llava import Llava

IMAGE_TOKEN = "<image>"
_ROWS = 64
"""The vocabulary is filled up to a multiple of this, as GPUs like it."""


def write_hf(answerer: Answerer, folder: Path, dtype: torch.dtype) -> None:
    """Fill a folder with everything that AutoModelForImageTextToText and AutoProcessor open; of a language model alone, what
    AutoModelForCausalLM and AutoTokenizer open.

    Adapters must be merged before (`merge_adapters`).

    Raises:
        InputError: a part of the model has no equal in transformers.
    """
    llava = answerer.llava
    text_config = copy.deepcopy(llava.config)
    text_config._attn_implementation = None
    text_config.dtype = dtype
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    if llava.vision is None:
        tokenizer = write_tokenizer(answerer, folder, None)
        text_config.architectures = [type(llava.llm).__name__]
        text_config.save_pretrained(folder)
        save_weights(language_weights(llava, text_config.vocab_size), folder, dtype)
        image_id = None
    else:
        vision_config = vision_config_of(llava.vision, answerer.transform.size)
        tokenizer = write_tokenizer(answerer, folder, IMAGE_TOKEN)
        image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        text_config.vocab_size = max(llava.config.vocab_size, -(-len(tokenizer) // _ROWS) * _ROWS)
        text_config.architectures = None
        _write_config(llava, folder, vision_config, text_config, image_id)
        save_weights(_weights(llava, vision_config, text_config.vocab_size), folder, dtype)
        _write_processor(answerer, folder, vision_config)
    stop = answerer.layout.stop_ids
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop[0],
        **({} if image_id is None else {"suppress_tokens": [image_id]}),
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    (folder / "README.md").write_text(model_card(answerer, dtype))


def write_tokenizer(answerer: Answerer, folder: Path, image_token: str | None, *, adds_bos: bool = False) -> Any:
    """The tokenizer, with an image token where one is asked for.

    Args:
        adds_bos: the tokenizer itself puts BOS in front of a text; else the chat template writes it.
    """
    tokenizer = copy.deepcopy(answerer.tokenizer)
    if image_token is not None and image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    spec = answerer.layout.spec
    bos = tokenizer.convert_ids_to_tokens(spec.bos) if spec.bos is not None else None
    tokenizer.chat_template = jinja(spec.template, None if adds_bos else bos, parts_said(IMAGE_TOKEN))
    # What ends an answer, for programs that ask the tokenizer and not generation_config.json (lmms-eval).
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(answerer.layout.stop_ids[0])
    for name in ("add_bos_token", "add_eos_token"):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, False)
    if image_token is not None:
        tokenizer.image_token = image_token
    tokenizer.save_pretrained(folder)
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    backend["post_processor"] = _puts_in_front(bos, spec.bos) if adds_bos and bos is not None else None
    (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("is_local", "local_files_only"):  # of this machine
        config.pop(name, None)
    config |= {"add_bos_token": adds_bos and bos is not None, "add_eos_token": False}
    if image_token is not None:
        config["image_token"] = image_token
    path.write_text(json.dumps(config, indent=1, ensure_ascii=False))
    return tokenizer


def _puts_in_front(token: str, number: int | None) -> dict[str, Any]:
    """tokenizer.json's post-processor that writes a token in front."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _write_config(llava: Llava, folder: Path, vision_config: Any, text_config: Any, image_id: int) -> None:
    from transformers import LlavaConfig

    assert llava.vision is not None and llava.projector is not None
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_id,
        projector_hidden_act="linear" if is_linear(llava.projector) else "gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full" if llava.vision.is_timm else "default",
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = text_config.dtype
    config.save_pretrained(folder)


def _weights(llava: Llava, vision_config: Any, rows: int) -> dict[str, Tensor]:
    assert llava.vision is not None and llava.projector is not None
    width = llava.config.hidden_size
    state: dict[str, Tensor] = {}
    state |= {f"vision_tower.vision_model.{n}": w for n, w in vision_weights(llava.vision, vision_config)}
    state |= {f"multi_modal_projector.{n}": w for n, w in projector_weights(llava.projector, width).items()}
    state |= {f"language_model.{n}": w for n, w in language_weights(llava, rows).items()}
    return state


def save_weights(state: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write weights as safetensors of 5 GB at most, with their index; only the file that is written is in memory twice."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    shapes = {name: torch.empty(value.shape, dtype=dtype, device="meta") for name, value in state.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size="5GB")
    for file, names in plan.filename_to_tensors.items():
        part = {name: state[name].detach().to("cpu", dtype, copy=True).contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))


def _write_processor(answerer: Answerer, folder: Path, vision_config: Any) -> None:
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
