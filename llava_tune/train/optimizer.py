"""AdamW over parameter groups: a component has its own learning rate, norms and biases have no weight decay."""

from __future__ import annotations

from typing import Any

import torch

from llava_tune.config import Optimizer
from llava_tune.model.llava import Llava


def parameter_groups(llava: Llava, config: Optimizer) -> list[dict[str, Any]]:
    """Groups for torch's optimizers, one for each (component, decayed or not) that has a trained weight."""
    rates = {
        "vision": config.vision_learning_rate or config.learning_rate,
        "projector": config.projector_learning_rate or config.learning_rate,
        "llm": config.learning_rate,
    }
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in llava.named_parameters():
        if parameter.requires_grad:
            dims = len(getattr(parameter, "ds_shape", parameter.shape))
            groups.setdefault((name.split(".", 1)[0], dims > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[component],
            "weight_decay": config.weight_decay if decayed else 0.0,
            "name": component,
        }
        for (component, decayed), parameters in groups.items()
    ]


def build_optimizer(llava: Llava, config: Optimizer) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(llava, config), lr=config.learning_rate, betas=config.betas, eps=config.eps
    )
