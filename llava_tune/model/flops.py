"""Floating-point operations of a training step, from the model's real shapes and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llava_tune.model.llava import Llava

PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 operations a second that NVIDIA's data sheets state, by a part of the device's name; the first that fits."""


def device_peak(name: str) -> float | None:
    """Dense bf16 operations a second of a device by its name; None if it isn't known."""
    return next((peak for part, peak in PEAKS.items() if part.replace(" ", "") in name.replace(" ", "")), None)


@dataclass(frozen=True)
class StepFlops:
    """What a training step costs: 2 operations for a multiplication with its addition; forward and backward.

    A backward pass costs as much as a forward pass for the activations' gradients, and as much again for the weights' where they
    are trained; nothing where no gradient flows (PaLM's model FLOPs, arXiv:2204.02311, appendix B, for partly frozen models).
    Activations that gradient checkpointing computes again are not counted.

    Attributes:
        token: of each token in the language model's matrices.
        pair: of each (query, key) pair of a sample, in all layers; causal: n (n + 1) / 2 pairs for n tokens.
        supervised: of each supervised token in the output head.
        image: of each image in the tower and the projector.
    """

    token: float
    pair: float
    supervised: float
    image: float

    def of(self, tokens: int, pairs: int, supervised: int, images: float) -> float:
        """Operations of so much."""
        return self.token * tokens + self.pair * pairs + self.supervised * supervised + self.image * images


def step_flops(llava: Llava) -> StepFlops:
    """The costs of a model as it is frozen now; it may lie on the meta device, or be partitioned by ZeRO-3.

    Mixtures of experts are counted as if every expert ran.
    """
    decoder, config = llava.llm.get_decoder(), llava.config
    total, trained = _matrices(decoder)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    head = llava.llm.get_output_embeddings().weight
    size = config.vocab_size * config.hidden_size
    image = 0.0
    if llava.vision is not None and llava.projector is not None:
        image = _image(llava.vision, llava.projector)
    return StepFlops(
        token=2 * (2 * total + trained),
        pair=3 * 4 * width * layers,
        supervised=2 * (3 if head.requires_grad else 2) * size,
        image=image,
    )


def _image(vision: Any, projector: nn.Module) -> float:
    total, trained = _matrices(vision)
    first, first_trained = _patch_embedding(vision)
    total, trained = total - first, trained - first_trained
    flows = any(p.requires_grad for p in vision.parameters())
    inside = vision.tokens if vision.is_timm else vision.tokens + 1  # the class token
    blocks = 2 * total * inside + 4 * vision.dim * inside**2 * _blocks(vision)
    tower = blocks * (2 if flows else 1) + 2 * trained * inside + 2 * (first + first_trained) * vision.tokens
    outer, outer_trained = _matrices(projector)
    passes = outer + outer_trained + (outer if flows else _behind_first(projector))
    return float(tower + 2 * vision.tokens * passes)


def _patch_embedding(vision: nn.Module) -> tuple[int, int]:
    """(weights, trained ones) of the convolution that makes patches; the pixels in front of it need no gradient."""
    weights = [m.weight for m in vision.modules() if isinstance(m, nn.Conv2d)][:1]
    sizes = [(_numel(getattr(w, "ds_shape", w.shape)), w.requires_grad) for w in weights]
    return sum(n for n, _ in sizes), sum(n for n, wanted in sizes if wanted)


def _behind_first(projector: nn.Module) -> int:
    """Matrices whose inputs need a gradient although the tower is frozen: all but the first."""
    sizes = [m.in_features * m.out_features for m in projector.modules() if isinstance(m, nn.Linear)]
    return sum(sizes[1:]) if any(p.requires_grad for p in projector.parameters()) else 0


def _blocks(vision: Any) -> int:
    body = vision.visual.trunk if vision.is_timm else vision.visual.transformer
    return len(getattr(body, "blocks", None) or getattr(body, "resblocks", None) or ())


def _matrices(module: nn.Module) -> tuple[int, int]:
    """(weights of all matrices that a token passes, of those that are trained); embeddings are looked up and cost nothing."""
    total = trained = 0
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            continue
        if isinstance(part, nn.Linear):  # by its shape: 4-bit weights are stored in fewer bytes
            sizes = [(part.in_features * part.out_features, part.weight.requires_grad)]
        else:
            own = part.named_parameters(name, recurse=False)
            shapes = [(n, p, getattr(p, "ds_shape", p.shape)) for n, p in own]
            sizes = [(_numel(s), p.requires_grad) for n, p, s in shapes if len(s) > 1 and "embed" not in n]
        total += sum(size for size, _ in sizes)
        trained += sum(size for size, wanted in sizes if wanted)
    return total, trained


def _numel(shape: Any) -> int:
    product = 1
    for side in shape:
        product *= int(side)
    return product
