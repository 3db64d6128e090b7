"""How large a model of a config is, without its weights: built on PyTorch's meta device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from llava_tune.config import Model
from llava_tune.errors import InputError
from llava_tune.hub import hub_answers, not_found
from llava_tune.model import internlm2
from llava_tune.model.factory import freeze
from llava_tune.model.language import add_lora
from llava_tune.model.llava import Llava
from llava_tune.model.projector import build_projector
from llava_tune.model.vision import build_vision

_ADAMW = 12
"""Bytes that a checkpoint holds of a trained weight: fp32 itself, and AdamW's two moments."""


def on_meta(model: Model) -> Llava:
    """A config's model with its adapters, frozen as the config says, on the meta device: shapes without memory.

    Raises:
        InputError: a part doesn't exist or doesn't fit.
    """
    with torch.device("meta"):
        llm = _language_model(model)
        if model.llm.lora.rank:
            add_lora(llm, model.llm.lora)
        vision = projector = None
        if model.vision is not None:
            vision = build_vision(dataclasses.replace(model.vision, pretrained=None))
            projector = build_projector(model.projector, vision.dim, llm.config.hidden_size)
            if model.vision.lora.rank:
                add_lora(vision, model.vision.lora)
    llava = Llava(vision, projector, llm)
    freeze(llava, model)
    return llava


def parameter_counts(model: Model) -> dict[str, tuple[int, int]]:
    """(parameters, trained ones) of vision, projector and llm, as far as the config has them.

    Raises:
        InputError: see `on_meta`.
    """
    llava = on_meta(model)
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in llava.named_parameters():
        part = name.split(".", 1)[0]
        total, trained = counts.get(part, (0, 0))
        counts[part] = (total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    return counts


def checkpoint_bytes(model: Model) -> int:
    """About how large a checkpoint is: what is trained, with its optimizer state.

    Raises:
        InputError: see `parameter_counts`.
    """
    return _ADAMW * sum(trained for _, trained in parameter_counts(model).values())


def _language_model(model: Model) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(model.llm.name)
    if internlm2.is_internlm2(folder):
        shape: Any = internlm2.llama_config(json.loads((folder / "config.json").read_text()))
    else:
        there = folder.is_dir() or hub_answers()
        try:
            shape = AutoConfig.from_pretrained(model.llm.name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if there else not_found(model.llm.name, error)
            raise InputError(f"model.llm.name {model.llm.name}: {reason}") from error
    mapping: Any = AutoModelForCausalLM._model_mapping
    if type(shape) not in mapping:
        raise InputError(f"model.llm.name {model.llm.name}: transformers has no causal language model of this kind")
    return mapping[type(shape)](shape)
