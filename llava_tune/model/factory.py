"""The factory: a config becomes a Llava with its weights, and a checkpoint becomes one again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_tune.config import Model, Run, from_json, to_json
from llava_tune.constants import BEST
from llava_tune.errors import InputError
from llava_tune.model.language import add_lora, build_language_model
from llava_tune.model.llava import Llava
from llava_tune.model.projector import build_projector
from llava_tune.model.vision import build_vision

WEIGHTS = "model.safetensors"
RUN_CONFIG = "llava_tune_run.json"
LLM_FOLDER = "llm"
"""The tokenizer, and config.json where the language model was drawn at random."""
VISION_CONFIG = "vision.json"


def build_llava(model: Model, *, dtype: torch.dtype = torch.float32, seed: int = 42) -> Llava:
    """Build a model from its config: the parts, their weights, adapters, what is frozen, `init_from`'s weights.

    Args:
        model: the config.
        dtype: of frozen weights; trained ones are fp32, the optimizer's precision.
        seed: of the weights that are drawn at random.

    Raises:
        InputError: a part, weights file or checkpoint is not there or doesn't fit.
    """
    torch.manual_seed(seed)
    vision = build_vision(model.vision) if model.vision is not None else None
    llm = build_language_model(model.llm, dtype)
    projector = build_projector(model.projector, vision.dim, llm.config.hidden_size) if vision is not None else None
    if vision is not None and model.vision is not None and model.vision.lora.rank:
        add_lora(vision, model.vision.lora)
    llava = Llava(vision, projector, llm)
    freeze(llava, model)
    if model.init_from is not None:
        load_weights(llava, read_weights(checkpoint_folder(model.init_from)), model.init_from)
    for parameter in llava.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    return llava


def freeze(llava: Llava, model: Model) -> None:
    """Set requires_grad as the config says: a frozen part trains only its adapters."""
    vision = model.vision is None or model.vision.freeze
    frozen = {"vision": vision, "projector": model.projector.freeze, "llm": model.llm.freeze}
    for name, parameter in llava.named_parameters():
        trained = "lora_" in name or not frozen[name.split(".", 1)[0]]
        parameter.requires_grad_(trained and parameter.is_floating_point())


def drawn_parts(model: Model) -> frozenset[str]:
    """Parts whose weights are drawn at random, so that a checkpoint must hold them even where they are frozen."""
    parts = set()
    if model.vision is not None:
        parts |= {"projector"} if model.vision.pretrained else {"projector", "vision"}
    if model.llm.weights == "random":
        parts.add("llm")
    if model.init_from is not None:
        parts |= {name.split(".", 1)[0] for name in weight_names(checkpoint_folder(model.init_from))}
    return frozenset(parts)


def _weights_file(checkpoint: Path) -> Path:
    path = checkpoint / WEIGHTS
    if not path.is_file():
        raise InputError(
            f"{checkpoint}: not a llava-tune checkpoint (no {WEIGHTS}). Expected a folder such as work_dirs/NAME/checkpoint-100"
        )
    return path


def weight_names(checkpoint: Path) -> list[str]:
    """Names of the weights that a checkpoint holds."""
    from safetensors import safe_open

    with safe_open(_weights_file(checkpoint), framework="pt") as file:
        return list(file.keys())


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All weights that a checkpoint holds.

    Raises:
        InputError: not a checkpoint, or its weights file is broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _weights_file(checkpoint)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: broken: {error}") from error


def load_weights(llava: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into the model, partitioned (ZeRO-3) or not.

    Raises:
        InputError: the model lacks one of them, or has it in another shape.
    """
    targets: dict[str, Any] = dict(llava.named_parameters()) | dict(llava.named_buffers())
    for name, value in weights.items():
        owner, _, last = name.rpartition(".")
        target = targets.get(name, targets.get(f"{owner}.base_layer.{last}"))  # a layer that has adapters now
        if target is None:
            raise InputError(
                f"{where} holds {name!r}, which the model of this config lacks. The config's model must be the checkpoint's: "
                "the same vision tower, projector kind, language model and lora settings"
            )
        shape = tuple(getattr(target, "ds_shape", target.shape))
        if shape != tuple(value.shape):
            raise InputError(f"{where}: {name} has shape {tuple(value.shape)}, the model of this config has {shape}")
        if hasattr(target, "ds_id"):
            import deepspeed

            with torch.no_grad(), deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                target.data.copy_(value)
        else:
            with torch.no_grad():
                target.copy_(value)


def checkpoint_folder(name: str | Path) -> Path:
    """The folder that a checkpoint's name means: WORK_DIR/latest, WORK_DIR/best (the latest, where none was found best), or itself."""
    folder = Path(name)
    if folder.name not in ("latest", "best") or folder.exists():
        return folder
    work_dir = folder.parent
    if folder.name == "best" and (work_dir / BEST).is_file():
        return work_dir / str(json.loads((work_dir / BEST).read_bytes())["checkpoint"])
    found = [p for p in work_dir.glob("checkpoint-*") if p.name[11:].isdigit() and (p / RUN_CONFIG).is_file()]
    return max(found, key=lambda p: int(p.name[11:]), default=folder)


def checkpoint_run(checkpoint: Path) -> Run:
    """The config that a checkpoint was trained with.

    Raises:
        InputError: not a checkpoint.
    """
    path = checkpoint / RUN_CONFIG
    if not checkpoint.exists():
        raise InputError(
            f"{checkpoint}: no such folder. Expected one that training left, such as work_dirs/NAME/latest or work_dirs/NAME/checkpoint-500"
        )
    if not path.is_file():
        found = sorted(p.name for p in checkpoint.glob("checkpoint-*")) if checkpoint.is_dir() else []
        hint = f" It holds {', '.join(found)}: name one of them" if found else ""
        raise InputError(f"{checkpoint}: not a llava-tune checkpoint (no {RUN_CONFIG}).{hint}")
    run: Run = from_json(path.read_bytes())
    model = run.model
    llm, vision = model.llm, model.vision
    if (checkpoint / LLM_FOLDER / "config.json").is_file():
        llm = dataclasses.replace(llm, name=str(checkpoint / LLM_FOLDER))
    if vision is not None and (checkpoint / VISION_CONFIG).is_file():
        vision = dataclasses.replace(vision, name=str(checkpoint / VISION_CONFIG))
    llm = dataclasses.replace(llm, tokenizer=str(checkpoint / LLM_FOLDER))
    return dataclasses.replace(run, model=dataclasses.replace(model, llm=llm, vision=vision))


def write_parts(llava: Llava, run: Run, folder: Path) -> None:
    """What a checkpoint needs beside the weights to be opened anywhere: the config, and the shapes of drawn parts."""
    (folder / RUN_CONFIG).write_text(to_json(run))
    if run.model.llm.weights == "random":
        llava.llm.config.save_pretrained(folder / LLM_FOLDER)
    if run.model.vision is not None and run.model.vision.name.endswith(".json"):
        shutil.copyfile(run.model.vision.name, folder / VISION_CONFIG)


def load_checkpoint(checkpoint: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Llava, Run]:
    """A trained model, ready to answer, with the config it was trained with.

    Raises:
        InputError: not a checkpoint, or one that lacks weights.
    """
    folder = checkpoint_folder(checkpoint)
    run = checkpoint_run(folder)
    llava = build_llava(dataclasses.replace(run.model, init_from=None), dtype=dtype)
    weights = read_weights(folder)
    expected = llava.trained_state(drawn_parts(dataclasses.replace(run.model, init_from=None)))
    if missing := set(expected) - set(weights):
        raise InputError(
            f"{folder}: {len(missing)} weights are missing, such as {sorted(missing)[0]}; the checkpoint is broken"
        )
    load_weights(llava, weights, str(folder))
    return llava.to(dtype).eval(), run
