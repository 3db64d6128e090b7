"""AdamW over parameter groups: a component has its own learning rate, norms and biases have no weight decay."""

from __future__ import annotations

import re
from typing import Any

import torch

from llava_tune.config import Optimizer
from llava_tune.model.llava import Llava

_BLOCK = re.compile(r"\.(?:resblocks|blocks)\.(\d+)\.")


def parameter_groups(llava: Llava, config: Optimizer) -> list[dict[str, Any]]:
    """Groups for torch's optimizers, one for each (component, decayed or not, learning rate) that has a trained weight."""
    rates = {
        "vision": config.vision_learning_rate or config.learning_rate,
        "projector": config.projector_learning_rate or config.learning_rate,
        "llm": config.learning_rate,
    }
    blocks = 1 + max((_block(name) for name, _ in llava.named_parameters()), default=-1)
    groups: dict[tuple[str, bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in llava.named_parameters():
        if parameter.requires_grad:
            component = name.split(".", 1)[0]
            dims = len(getattr(parameter, "ds_shape", parameter.shape))
            behind = blocks - 1 - _block(name) if component == "vision" else 0
            rate = rates[component] * config.vision_layer_decay**behind
            groups.setdefault((component, dims > 1, rate), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "name": component,
        }
        for (component, decayed, rate), parameters in groups.items()
    ]


def _block(name: str) -> int:
    """Which block of the vision tower a weight belongs to, from 0; -1: what is in front of them (patches, positions)."""
    found = _BLOCK.search(name) if name.startswith("vision.") else None
    return int(found.group(1)) if found else -1


def build_optimizer(llava: Llava, config: Optimizer) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(llava, config), lr=config.learning_rate, betas=config.betas, eps=config.eps
    )
