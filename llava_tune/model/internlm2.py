"""InternLM2 checkpoints in their own layout, re-laid as Llama's: the same network, so no remote code is needed.

InternLM2 (arXiv:2403.17297) keeps q, k and v of a key-value group together in one `wqkv` of
[kv_heads, groups + 2, head_dim, hidden], and names SwiGLU's matrices w1 (gate), w3 (up), w2 (down).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_tune.errors import InputError
from llava_tune.paths import cache_folder, whole_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig

_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SAME = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
max_position_embeddings rms_norm_eps initializer_range bos_token_id eos_token_id pad_token_id tie_word_embeddings
"""
_CONVERSION = "1"  # raise it when the conversion changes: it is part of the cache's key


def is_internlm2(folder: Path) -> bool:
    """Does the folder's config.json say model_type internlm2?"""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "internlm2"


def llama_config(config: dict[str, Any]) -> LlamaConfig:
    """InternLM2's config.json as a LlamaConfig.

    Raises:
        InputError: it has biases, which Llama's layout can't hold here.
    """
    from transformers import LlamaConfig

    if config.get("bias", False):
        raise InputError("this InternLM2 checkpoint has biases (config.json: bias true), which are not supported")
    same = _SAME.split()
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    if scaling := config.get("rope_scaling"):
        rope |= {"rope_type": scaling.get("type", scaling.get("rope_type")), "factor": scaling["factor"]}
    return LlamaConfig(**{k: config[k] for k in same if k in config}, rope_parameters=rope)


def convert_weights(theirs: Iterator[tuple[str, Tensor]], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """InternLM2's (name, weight) pairs as Llama's.

    Raises:
        InputError: a name that InternLM2 does not have.
    """
    heads = config.num_attention_heads
    kv = config.num_key_value_heads or heads
    dim = config.hidden_size // heads
    whole = {
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "model.norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for name, weight in theirs:
        if name in whole:
            yield whole[name], weight
            continue
        layer, _, part = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        prefix = f"model.layers.{layer}"
        if part == "attention.wqkv":
            grouped = weight.view(kv, heads // kv + 2, dim, config.hidden_size)
            pieces = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
            for x, piece in pieces.items():
                yield f"{prefix}.self_attn.{x}_proj.weight", piece.reshape(-1, config.hidden_size).contiguous()
        elif part in _NAMES:
            yield f"{prefix}.{_NAMES[part]}.weight", weight
        elif not part.endswith("rotary_emb.inv_freq"):
            raise InputError(f"the InternLM2 checkpoint holds the weight {name!r}, which InternLM2 does not have")


def converted_folder(folder: Path) -> Path:
    """Where the conversion of a checkpoint is kept in the cache."""
    stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in [folder / "config.json", *_weight_files(folder)]]
    digest = hashlib.sha256(json.dumps([_CONVERSION, str(folder.resolve()), stamp]).encode()).hexdigest()[:24]
    return cache_folder() / "internlm2" / digest


def convert(folder: Path) -> Path:
    """Convert a checkpoint into the cache, a file at a time, once. Returns the converted folder, in Llama's layout."""
    target = converted_folder(folder)
    if target.is_dir():
        return target
    from safetensors.torch import save_file

    raw = json.loads((folder / "config.json").read_text())
    config = llama_config(raw)
    files = _weight_files(folder)
    with whole_folder(target) as beside:
        index: dict[str, str] = {}
        for i, path in enumerate(files, start=1):
            shard = dict(convert_weights(_tensors(path), config))
            name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
            save_file({k: v.contiguous() for k, v in shard.items()}, beside / name, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, name)
        if files:
            (beside / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        config.architectures = ["LlamaForCausalLM"]
        if dtype := raw.get("torch_dtype"):
            config.dtype = dtype
        config.save_pretrained(beside)
    return target


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
        return
    import torch

    yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
