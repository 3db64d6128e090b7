"""A trained model's weights under transformers' names; adapters merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llava_tune.errors import InputError
from llava_tune.model.llava import Llava
from llava_tune.model.vision import VisionEncoder


def merge_adapters(module: nn.Module, *, add: bool = True) -> None:
    """Turn a part's adapted and 4-bit layers into plain ones, in place; without what the adapters add if `add` is False.

    An adapter's change is added to its layer (LoRA, arXiv:2106.09685; DoRA, 2402.09353); 4-bit weights (2305.14314) become the
    numbers that they stand for.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            weight = _numbers(base.weight).detach()
            module.set_submodule(name, _plain(base, _merged(layer, weight) if add else weight))
    for name, layer in list(module.named_modules()):  # 4-bit layers without an adapter
        if isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state"):
            module.set_submodule(name, _plain(layer, _numbers(layer.weight).detach()))


def _plain(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return plain


def round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Round parameters, all but adapters', to what `dtype` can hold, in place; they stay in the type that they have."""
    for name, parameter in module.named_parameters():
        if "lora_" in name or not parameter.is_floating_point():
            continue
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _numbers(weight: Tensor) -> Tensor:
    if not hasattr(weight, "quant_state"):
        return weight
    import bitsandbytes.functional

    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def _merged(layer: Any, weight: Tensor) -> Tensor:
    merged = weight.float()
    for adapter in layer.active_adapters:
        change = layer.get_delta_weight(adapter).float()
        if layer.use_dora.get(adapter, False):
            magnitude = layer.lora_magnitude_vector[adapter]
            norm = magnitude.get_weight_norm(merged, change, scaling=1).detach()
            merged = (magnitude.weight.float() / norm)[:, None] * (merged + change)
        else:
            merged = merged + change
    return merged.to(weight.dtype)


_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attn.proj": "self_attn.out_proj",
}


def vision_config_of(vision: VisionEncoder, size: int) -> Any:
    """transformers' config of a tower: CLIPVisionConfig for open_clip's ViT, SiglipVisionConfig for timm's plain ViT.

    Layers behind the features are not there, so the features are the last layer's: vision_feature_layer is -1.

    Raises:
        InputError: transformers has no model that is this tower.
    """
    return _siglip_config(vision, size) if vision.is_timm else _clip_config(vision, size)


def _no_equal(what: str) -> InputError:
    return InputError(
        f"the vision tower can't be exported: {what}, and transformers' LLaVA knows CLIP's ViT and SigLIP's only. Train with a ViT of "
        "open_clip (such as ViT-L-14-336-quickgelu or ViT-B-16-SigLIP) to export it"
    )


def _clip_config(vision: VisionEncoder, size: int) -> Any:
    from transformers import CLIPVisionConfig

    visual = vision.visual
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is None or not hasattr(visual, "class_embedding"):
        raise _no_equal(f"it is a {type(visual).__name__}")
    block = blocks[0]
    if isinstance(visual.ln_pre, nn.Identity):
        raise _no_equal("it has no layer norm in front of its blocks")
    if not isinstance(getattr(block, "ls_1", nn.Identity()), nn.Identity):
        raise _no_equal("its blocks have layer scale")
    return CLIPVisionConfig(
        hidden_size=vision.dim,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=size,
        patch_size=int(visual.conv1.kernel_size[0]),
        hidden_act="gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu",
        layer_norm_eps=block.ln_1.eps,
    )


def _siglip_config(vision: VisionEncoder, size: int) -> Any:
    from transformers import SiglipVisionConfig

    trunk = vision.visual.trunk
    blocks = getattr(trunk, "blocks", None)
    if blocks is None or type(trunk).__name__ != "VisionTransformer":
        raise _no_equal(f"timm's {type(trunk).__name__} is no plain ViT")
    block = blocks[0]
    plain = (
        trunk.num_prefix_tokens == 0
        and isinstance(trunk.norm_pre, nn.Identity)
        and isinstance(block.ls1, nn.Identity)
        and isinstance(block.attn.q_norm, nn.Identity)
    )
    if not plain:
        raise _no_equal("it has a class token, layer scale or another extra that SigLIP has not")
    approximate = getattr(block.mlp.act, "approximate", None)
    return SiglipVisionConfig(
        hidden_size=vision.dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=size,
        patch_size=int(trunk.patch_embed.proj.kernel_size[0]),
        hidden_act="gelu_pytorch_tanh" if approximate == "tanh" or "Tanh" in type(block.mlp.act).__name__ else "gelu",
        layer_norm_eps=block.norm1.eps,
        vision_use_head=False,
    )


def vision_weights(vision: VisionEncoder, config: Any) -> Iterator[tuple[str, Tensor]]:
    """A tower's weights under CLIPVisionModel's or SiglipVisionModel's names."""
    state = vision.state_dict()
    width = config.hidden_size
    device = next(iter(state.values())).device
    yield "post_layernorm.weight", torch.ones(width, device=device)  # behind the features: never used
    yield "post_layernorm.bias", torch.zeros(width, device=device)
    if vision.is_timm:
        state = {name.removeprefix("visual.trunk."): value for name, value in state.items()}
        yield "embeddings.patch_embedding.weight", state["patch_embed.proj.weight"]
        yield "embeddings.patch_embedding.bias", state["patch_embed.proj.bias"]
        yield "embeddings.position_embedding.weight", state["pos_embed"][0]
        names, block_name, qkv = _TIMM_BLOCK, "blocks", "attn.qkv.{end}"
    else:
        state = {name.removeprefix("visual."): value for name, value in state.items()}
        yield "embeddings.class_embedding", state["class_embedding"]
        yield "embeddings.position_embedding.weight", state["positional_embedding"]
        yield "embeddings.patch_embedding.weight", state["conv1.weight"]
        for end in ("weight", "bias"):
            yield f"pre_layrnorm.{end}", state[f"ln_pre.{end}"]
        names, block_name, qkv = _CLIP_BLOCK, "transformer.resblocks", "attn.in_proj_{end}"
    for i in range(config.num_hidden_layers):
        ours, theirs = f"{block_name}.{i}", f"encoder.layers.{i}"
        for end in ("weight", "bias"):
            joint = state[f"{ours}.{qkv.format(end=end)}"]
            for letter, piece in zip("qkv", joint.chunk(3), strict=True):
                yield f"{theirs}.self_attn.{letter}_proj.{end}", piece
            for name, renamed in names.items():
                yield f"{theirs}.{renamed}.{end}", state[f"{ours}.{name}.{end}"]


def is_linear(projector: nn.Module) -> bool:
    """Whether a projector is one linear layer."""
    return sum(isinstance(m, nn.Linear) for m in projector.modules()) == 1


def projector_weights(projector: nn.Module, width: int) -> dict[str, Tensor]:
    """linear_1 and linear_2 of LlavaMultiModalProjector; a linear projector's second layer is the identity."""
    layers = [m for m in projector if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
    weights = {"linear_1.weight": layers[0].weight, "linear_1.bias": layers[0].bias}
    if len(layers) == 2:
        weights |= {"linear_2.weight": layers[1].weight, "linear_2.bias": layers[1].bias}
    else:
        device = layers[0].weight.device
        weights |= {
            "linear_2.weight": torch.eye(width, device=device),
            "linear_2.bias": torch.zeros(width, device=device),
        }
    return {name: value.detach() for name, value in weights.items()}


def language_weights(llava: Llava, rows: int) -> dict[str, Tensor]:
    """The language model's weights, its vocabulary filled up to `rows`: new embeddings are zero, new outputs the mean of all."""
    state = dict(llava.llm.state_dict())
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if head not in state and not llava.config.tie_word_embeddings:
        raise InputError("the language model has no lm_head: its output head can't be exported")
    missing = rows - state[embedding].shape[0]
    if missing > 0:
        table = state[embedding]
        state[embedding] = torch.cat([table, table.new_zeros(missing, table.shape[1])])
        if head in state:
            table = state[head]
            state[head] = torch.cat([table, table.mean(0, keepdim=True).expand(missing, -1)])
    return state
