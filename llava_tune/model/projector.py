"""The projector: vision features to language embeddings."""

from __future__ import annotations

from torch import nn

from llava_tune.config import Projector


def build_projector(config: Projector, vision_dim: int, llm_dim: int) -> nn.Sequential:
    """linear: one layer (LLaVA, arXiv:2304.08485); mlp2x_gelu: two with a GELU between (LLaVA-1.5, arXiv:2310.03744).

    Maps float [images, patches, vision_dim] to [images, patches, llm_dim].
    """
    layers: list[nn.Module] = [nn.Linear(vision_dim, llm_dim)]
    if config.kind == "mlp2x_gelu":
        layers += [nn.GELU(), nn.Linear(llm_dim, llm_dim)]
    return nn.Sequential(*layers)
