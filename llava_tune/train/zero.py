"""DeepSpeed's engine makes its step within the backward pass: what it does with a spoilt one, and what is read of its gradients before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llava_tune.model.llava import Llava


def drops_spoilt_steps(config: dict[str, Any]) -> bool:
    """Whether the engine leaves a step out whose gradients aren't finite numbers: every ZeRO stage does, unless told not to look.

    Args:
        config: DeepSpeed's.
    """
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    return stage > 0 and bool(config.get("bf16", {}).get("check_grad_overflow", True))


def before_each_step(engine: Any, look: Callable[[], None]) -> None:
    """Call `look` whenever a global batch's gradients are there, reduced and not yet used."""
    step = engine.step

    def looking(*args: Any, **kwargs: Any) -> Any:
        look()
        return step(*args, **kwargs)

    engine.step = looking


def gradient_squares(llava: Llava) -> dict[str, float]:
    """Of each component, the sum of its gradients' squares over all ranks, before the step; 0 where nothing is trained, or where the
    gradients would have to be read from NVMe first."""
    components = tuple(name for name, _ in llava.named_children())
    device = next(llava.parameters()).device
    sums = torch.zeros(len(components), dtype=torch.float64, device=device)
    for name, parameter in llava.named_parameters():
        part = _own_part(parameter) if parameter.requires_grad else None
        if part is not None:
            sums[components.index(name.split(".", 1)[0])] += (
                torch.linalg.vector_norm(part.float()).to(device).double() ** 2
            )
    torch.distributed.all_reduce(sums)
    return dict(zip(components, sums.tolist(), strict=True))


def _own_part(parameter: Any) -> Tensor | None:
    """The part of a weight's gradient that this rank keeps; None if it keeps none."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        if getattr(parameter._z3_optimizer, "swap_optimizer", False):
            return None
        part: Tensor = parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
        return part
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    fragment: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    if fragment.numel() == parameter.numel():  # the whole gradient is kept here, of which a part counts
        where = mapping.lp_fragment_address
        fragment = fragment.narrow(0, where.start, where.numel)
    return fragment
