"""How much memory training a config takes on each device, part by part, found without the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from llava_tune.config import Model
from llava_tune.model.loss import CHUNK_ELEMENTS
from llava_tune.model.size import on_meta

_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight with its double-quantised scales (QLoRA, arXiv:2305.14314, section 3)."""


class _Fused(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps for its backward pass: q, k, v, the output and a sum for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, None]:
        raise RuntimeError("only counted")


class _FusedAttention(TorchFunctionMode):
    """While it is on, scaled_dot_product_attention is `_Fused`: for tensors without memory PyTorch has no fused kernel to take."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = args[:3] if len(args) >= 3 else tuple(kwargs[k] for k in ("query", "key", "value"))
        if torch.is_autocast_enabled("cpu"):
            given = tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in given)
        return _Fused.apply(*given)


class SavedBytes:
    """Counts the tensors that autograd keeps while the block runs, each storage once, parameters not."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self._known = {p.untyped_storage()._cdata for p in module.parameters()}
        self._kept: list[Tensor] = []  # so that a storage's address isn't given to another
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


@contextmanager
def _without_memory(part: nn.Module, dtype: torch.dtype, *, autocast: bool) -> Iterator[SavedBytes]:
    """A part of a model on the meta device, on a CPU without memory while the block runs, which counts what autograd keeps. (The meta device
    has no autocast.)

    Args:
        dtype: of the frozen weights and of what is computed.
        autocast: trained weights are fp32, and cast where they are used; else of the same dtype.
    """
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32), _FusedAttention():
        for module in part.modules():
            for name, weight in module.named_parameters(recurse=False):
                kind = torch.float32 if autocast and weight.requires_grad else dtype
                module.register_parameter(
                    name, nn.Parameter(torch.empty(weight.shape, dtype=kind), weight.requires_grad)
                )
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        with SavedBytes(part) as saved:
            yield saved


def decoder_activations(llm: Any, rows: int, length: int, layers: int, dtype: torch.dtype, *, autocast: bool) -> int:
    """Bytes that the first `layers` of a language model's decoder on the meta device keep for the backward pass."""
    decoder = llm.get_decoder()
    whole, attention = decoder.layers, decoder.config._attn_implementation
    decoder.layers = whole[:layers]
    decoder.config._attn_implementation = "sdpa"
    try:
        with _without_memory(decoder, dtype, autocast=autocast) as saved:
            decoder(
                inputs_embeds=torch.empty(rows, length, decoder.config.hidden_size, dtype=dtype, requires_grad=True),
                position_ids=torch.arange(length)[None].expand(rows, -1),
                attention_mask=torch.zeros(1, 1, 1, 2, dtype=torch.int32),
                use_cache=False,
            )
    finally:
        decoder.layers, decoder.config._attn_implementation = whole, attention
    return saved.bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, by part.

    Attributes:
        weights, gradients, optimizer: exact; what ZeRO partitions is divided by the number of ranks.
        activations: what the forward pass of a micro batch keeps, and one layer's more where layers are computed again.
        logits: of one chunk of the loss with its gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def training_memory(
    model: Model,
    *,
    ranks: int,
    zero_stage: int,
    offload_optimizer: bool,
    bf16: bool,
    rows: int,
    length: int,
    images: int,
    checkpointing: bool,
) -> Memory:
    """What a training step takes on each device.

    Trained weights, their gradients and AdamW's two moments are fp32; with DeepSpeed in bf16, weights and gradients are bf16, and with
    DeepSpeed in any precision the optimizer has an fp32 copy of the weights beside its moments. ZeRO-1 divides the optimizer's part by
    the ranks, ZeRO-2 the gradients too, ZeRO-3 the weights too (arXiv:1910.02054).

    Args:
        rows, length: of a micro batch.
        images: in a micro batch.

    Raises:
        InputError: a part of the model doesn't exist or doesn't fit.
    """
    llava = on_meta(model)
    frozen_bytes = 2.0 if bf16 else 4.0
    low = bf16 and zero_stage > 0
    trained_bytes, moments = 2 if low else 4, 12 if zero_stage else 8
    trained = weights = 0
    for name, parameter in llava.named_parameters():
        count = parameter.numel()
        if parameter.requires_grad:
            trained += count
            weights += trained_bytes * count
        elif model.llm.quantization == "nf4" and name.startswith("llm.") and _quantized(name, parameter):
            weights += int(_NF4_BYTES * count)
        else:
            weights += int(frozen_bytes * count)
    share = [ranks if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    optimizer = 0 if offload_optimizer else moments * trained // share[0]
    dtype = torch.bfloat16 if bf16 else torch.float32
    layers = llava.config.num_hidden_layers
    one, two = (decoder_activations(llava.llm, rows, length, n, dtype, autocast=not zero_stage) for n in (1, 2))
    layer, rest = two - one, 2 * one - two
    hidden = rows * length * llava.config.hidden_size * dtype.itemsize
    activations = rest + (layers * hidden + layer if checkpointing else layers * layer)
    if llava.vision is not None and llava.projector is not None:
        activations += _vision_activations(llava, images, dtype, checkpointing, autocast=not zero_stage)
    head = llava.llm.get_output_embeddings().weight
    logits = CHUNK_ELEMENTS * (4 + dtype.itemsize) + hidden + (4 * head.numel() if head.requires_grad else 0)
    return Memory(weights // share[2], trained_bytes * trained // share[1], optimizer, activations, logits)


def _quantized(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name


def _vision_activations(llava: Any, images: int, dtype: torch.dtype, checkpointing: bool, *, autocast: bool) -> int:
    vision = llava.vision
    features = images * vision.tokens * vision.dim * dtype.itemsize
    out = images * vision.tokens * llava.config.hidden_size * dtype.itemsize
    projector = features + 2 * out
    if not any(p.requires_grad for p in vision.parameters()):
        return int(projector)
    size = vision.input_size
    with _without_memory(vision, dtype, autocast=autocast) as saved:
        vision(torch.empty(images, 3, size, size, dtype=dtype))
    if not checkpointing:
        return int(projector + saved.bytes)
    blocks = len(
        getattr(vision.visual.trunk if vision.is_timm else vision.visual.transformer, _BLOCKS[vision.is_timm], ())
    )
    return int(projector + (saved.bytes if blocks == 0 else blocks * features + saved.bytes // blocks))


_BLOCKS = {True: "blocks", False: "resblocks"}
