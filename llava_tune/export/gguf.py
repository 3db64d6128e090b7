"""A checkpoint as llama.cpp opens it: the language model in one GGUF file, vision tower and projector (mmproj) in another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llava_tune import __version__
from llava_tune.data.images import ImageTransform
from llava_tune.errors import InputError
from llava_tune.evaluate.answer import Answerer
from llava_tune.export.chat_template import MARKERS_SAID, jinja
from llava_tune.export.weights import is_linear, language_weights, projector_weights, vision_config_of, vision_weights
from llava_tune.model.llava import Llava

_TYPES = {
    "fp32": gguf.GGMLQuantizationType.F32,
    "fp16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    "fp32": gguf.LlamaFileType.ALL_F32,
    "fp16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def text_name(dtype: str) -> str:
    """The language model's file."""
    return f"model-{dtype.replace('fp', 'f')}.gguf"


def vision_name(dtype: str) -> str:
    """The vision tower's and projector's file."""
    return f"mmproj-{dtype.replace('fp', 'f')}.gguf"


def write_gguf(answerer: Answerer, folder: Path, dtype: str) -> None:
    """Fill a folder with the model's GGUF file and, if it sees, its mmproj. Adapters must be merged before.

    Args:
        dtype: fp32, fp16 or q8_0; vectors, and what llama.cpp has no other type for, stay in more.

    Raises:
        InputError: a part of the model has no equal in llama.cpp, or none that is written here.
    """
    write_text(answerer, folder / text_name(dtype), dtype)
    if answerer.llava.vision is not None:
        write_vision(answerer.llava, answerer.transform, folder / vision_name(dtype), dtype)
    (folder / "README.md").write_text(_card(answerer, dtype))


def _card(answerer: Answerer, dtype: str) -> str:
    sees = answerer.llava.vision is not None
    files = f"-m {text_name(dtype)}" + (f" --mmproj {vision_name(dtype)}" if sees else "")
    program = "llama-mtmd-cli" if sees else "llama-cli"
    padded = (
        "Pictures are padded to a square, as in training. "
        if answerer.transform.pad_to_square
        else "llama.cpp pads a picture to a square, while in training its centre was cut out: give it square pictures. "
    )
    return f"""# A model for llama.cpp, trained with llava-tune {__version__}

    llama-server {files} --jinja
    {program} {files} --jinja{" --image picture.jpg" if sees else ""} -p "What is this?"

{padded if sees else ""}`gate.json` says how the files were compared with the model they were made from, and by which build of llama.cpp.
"""


def rounded(weight: Tensor, dtype: str) -> Tensor:
    """A weight's numbers after they went through a file of that precision."""
    values = weight.detach().float().cpu().numpy()
    kind = _type_of(values, dtype)
    return torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(values, kind), kind))).reshape(weight.shape)


def _type_of(values: np.ndarray, dtype: str) -> gguf.GGMLQuantizationType:
    """Vectors stay in f32, as llama.cpp wants them; so do, in q8_0, rows that aren't whole blocks of 32."""
    if values.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    kind = _TYPES[dtype]
    if kind == gguf.GGMLQuantizationType.Q8_0 and (values.ndim != 2 or values.shape[-1] % 32):
        return gguf.GGMLQuantizationType.F16
    return kind


def _add(writer: gguf.GGUFWriter, name: str, weight: Tensor, dtype: str) -> None:
    values = weight.detach().float().cpu().contiguous().numpy()
    kind = _type_of(values, dtype)
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_text(answerer: Answerer, path: Path, dtype: str) -> None:
    """The language model with its tokenizer and chat template."""
    config: Any = answerer.llava.config
    arch = _ARCHITECTURES.get(config.model_type)
    if arch is None:
        raise InputError(
            f"the language model is a {config.model_type}; GGUF is written for {', '.join(_ARCHITECTURES)} and InternLM2. Export with "
            "--format hf and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(str(answerer.run.work_dir or "llava-tune")).name)
    writer.add_description(f"trained with llava-tune {__version__}")
    writer.add_file_type(_FILE_TYPES[dtype])
    _add_shape(writer, config)
    rows = max(config.vocab_size, len(answerer.tokenizer))
    writer.add_vocab_size(rows)
    add_tokenizer(writer, answerer, rows)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in language_weights(answerer.llava, rows).items():
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise InputError(f"the language model's {name} has no name in llama.cpp's {config.model_type}")
        kind = name.split(".")[-2]
        if arch == gguf.MODEL_ARCH.LLAMA and kind in heads:
            weight = interleaved(weight, heads[kind])
        _add(writer, renamed, weight, dtype)
    _write(writer)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """q or k rows in the order of llama.cpp's rotary embedding, which turns neighbours where transformers turns halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in (
        "default",
        "dynamic",
        "linear",
    ):  # dynamic: nothing changes within the length that the model was trained with
        raise InputError(
            f"the language model's rotary embedding is of type {kind!r}, which isn't written as GGUF here. Export with --format hf and "
            "convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}@| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {_SPLIT.replace("@", "{1,3}"): "llama-bpe", _SPLIT.replace("@", ""): "qwen2"}
"""llama.cpp's names of the patterns that split a text before BPE."""


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    found = backend["pre_tokenizer"]
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (known := _PRE_TOKENIZERS.get(steps[0]["pattern"].get("Regex", ""))):
        return known
    raise InputError(
        f"the tokenizer splits text by {json.dumps(found)[:200]}, which isn't known here by llama.cpp's name for it. Export with "
        "--format hf and convert that folder with llama.cpp's convert_hf_to_gguf.py"
    )


def add_tokenizer(writer: gguf.GGUFWriter, answerer: Answerer, rows: int) -> None:
    """The vocabulary, filled up to `rows`; merges of byte-level BPE, or scores of BPE with byte fallback (sentencepiece's)."""
    backend = json.loads(answerer.tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer is a {model['type']} model; GGUF is written for BPE. Export with --format hf")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [gguf.TokenType.UNUSED] * rows
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    byte_level = not model.get("byte_fallback")
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(backend))
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model["merges"], model["vocab"], rows))
        for i, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x"):
                kinds[i] = gguf.TokenType.BYTE
    for token in backend["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        kinds[unknown] = gguf.TokenType.UNKNOWN
        writer.add_unk_token_id(unknown)
    tokens = [token.replace("\0", "<nul>") for token in tokens]  # a C string ends there
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    spec, stops = answerer.layout.spec, answerer.layout.stop_ids
    bos = answerer.tokenizer.bos_token_id if spec.bos is None else spec.bos
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(spec.bos is not None)
    writer.add_add_eos_token(False)
    writer.add_eos_token_id(stops[0])
    if len(stops) > 1:
        writer.add_eot_token_id(stops[1])
    writer.add_add_space_prefix(False)
    written = answerer.tokenizer.convert_ids_to_tokens(spec.bos) if spec.bos is not None else None
    writer.add_chat_template(jinja(spec.template, written, MARKERS_SAID))


def _scores(merges: list[Any], vocab: dict[str, int], rows: int) -> list[float]:
    """Of each piece, minus the rank of the first merge that makes it: what is merged first has the highest."""
    scores = [-1e9] * rows
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        made = vocab["".join(pair)]
        scores[made] = max(scores[made], -float(rank))
    return scores


_VISION_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_down",  # the order that llama.cpp keeps for old files
    "mlp.fc2": "ffn_up",
}


def write_vision(llava: Llava, transform: ImageTransform, path: Path, dtype: str) -> None:
    """The mmproj: vision tower and projector."""
    assert llava.vision is not None and llava.projector is not None
    config = vision_config_of(llava.vision, transform.size)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name("vision tower and projector")
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", config.hidden_act != "quick_gelu")
    keys: dict[str, int] = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "projection_dim": llava.config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    for key, value in keys.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", config.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", list(transform.mean))
    writer.add_array("clip.vision.image_std", list(transform.std))
    writer.add_array("clip.vision.feature_layer", [config.num_hidden_layers])
    for name, weight in _vision_tensors(llava, config):
        # Convolution and positions stay whole: they are small, and llama.cpp has no kernel for other types everywhere.
        whole = name.startswith(("v.position_embd", "v.class_embd", "v.patch_embd"))
        _add(writer, name, weight, "fp32" if whole else dtype)
    _write(writer)


def _vision_tensors(llava: Llava, config: Any) -> Iterator[tuple[str, Tensor]]:
    assert llava.vision is not None and llava.projector is not None
    for name, weight in vision_weights(llava.vision, config):
        if name.startswith("post_layernorm"):
            continue
        owner, _, end = name.rpartition(".")
        if name == "embeddings.class_embedding":
            yield _VISION_NAMES[name], weight
        elif owner.startswith("encoder.layers."):
            _, _, number, part = owner.split(".", 3)
            yield f"v.blk.{number}.{_VISION_NAMES[part]}.{end}", weight
        else:
            yield f"{_VISION_NAMES[owner]}.{end}", weight
    weights = projector_weights(llava.projector, llava.config.hidden_size)
    if is_linear(llava.projector):
        weights = without_gelu(weights["linear_1.weight"], weights["linear_1.bias"])
    for place, layer in (("0", "linear_1"), ("2", "linear_2")):
        for end in ("weight", "bias"):
            yield f"mm.{place}.{end}", weights[f"{layer}.{end}"]


def without_gelu(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """A linear layer as two with a GELU between them, as llama.cpp computes: x = gelu(x) - gelu(-x)."""
    one = torch.eye(weight.shape[0], device=weight.device, dtype=weight.dtype)
    return {
        "linear_1.weight": torch.cat([weight, -weight]),
        "linear_1.bias": torch.cat([bias, -bias]),
        "linear_2.weight": torch.cat([one, -one], dim=1),
        "linear_2.bias": torch.zeros_like(bias),
    }
