"""The language model: any causal LM of transformers, InternLM2 re-laid as Llama, 4-bit if asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_tune.config import LanguageModel, Lora
from llava_tune.errors import InputError, missing_package
from llava_tune.hub import from_hub
from llava_tune.model import internlm2
from llava_tune.model.attention import PER_SAMPLE, supports_per_sample


def model_folder(config: LanguageModel) -> str:
    """The folder or Hub name that transformers opens: `config.name`, or the cached conversion of an InternLM2.

    Raises:
        InputError: a path that is not there.
    """
    folder = Path(config.name)
    if not folder.is_dir():
        if config.name.startswith((".", "/", "~")) or config.name.count("/") != 1:
            raise InputError(
                f"model.llm.name {config.name}: no such folder, and not a Hugging Face name (owner/model). Expected a folder with "
                "config.json and weights"
            )
        folder = _download_if_internlm2(config.name) or folder
    if internlm2.is_internlm2(folder):
        return str(internlm2.convert(folder))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"model.llm.name {config.name}: the folder has no config.json")
    return config.name


def _download_if_internlm2(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download, snapshot_download

    with from_hub(f"model.llm.name {name}", name):
        config = Path(hf_hub_download(name, "config.json"))
    if not internlm2.is_internlm2(config.parent):
        return None
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "tokenizer.model"]))


def build_language_model(config: LanguageModel, dtype: torch.dtype) -> Any:
    """The model with its weights (or random ones), adapters and quantization as the config says.

    Args:
        dtype: of the weights as loaded.

    Raises:
        InputError: no such model, or a package that the config needs is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = model_folder(config)
    attention = "sdpa" if config.attention == "auto" else config.attention
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "model.llm.attention=flash_attention_2 needs the package flash-attn, which is not installed. Run: pip install flash-attn "
            "--no-build-isolation; or set 'auto', which isolates packed samples as well"
        )
    if config.weights == "random":
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        shape._attn_implementation = attention
        mapping: Any = AutoModelForCausalLM._model_mapping
        model = mapping[type(shape)](shape).to(
            dtype
        )  # not from_config: ZeRO-3 would partition it before its weights are drawn
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                **_quantization(config, dtype),
            )
        except (OSError, ValueError) as error:
            raise InputError(f"model.llm.name {config.name} can't be loaded: {str(error).splitlines()[0]}") from error
    if config.quantization != "none":
        for module in model.modules():
            # On a CPU with AVX512-BF16 bitsandbytes repacks the weights in the first evaluation: in bf16 whatever was asked for, wrongly
            # for rows that aren't whole blocks, and so that they can't be merged any more.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if config.attention == "auto" and supports_per_sample(model):
        model.set_attn_implementation(PER_SAMPLE)
    if config.lora.rank:
        add_lora(model, config.lora)
    return model


def _quantization(config: LanguageModel, dtype: torch.dtype) -> dict[str, Any]:
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise missing_package("bitsandbytes", "qlora", "model.llm.quantization=nf4")
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    device: Any = {"": torch.cuda.current_device()} if torch.cuda.is_available() else {"": "cpu"}
    return {"quantization_config": quantized, "device_map": device}


def add_lora(model: nn.Module, lora: Lora) -> None:
    """Put adapters into the model's linear layers, in place; the adapters' weights are the trainable ones."""
    from peft import LoraConfig, inject_adapter_in_model

    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    linear: tuple[type, ...] = (nn.Linear, *_quantized_linears())
    found = {name for name, m in model.named_modules() if isinstance(m, linear) and m is not head}
    short = {name.rsplit(".", 1)[-1] for name in found}
    if unknown := set(lora.targets) - short - found:
        raise InputError(
            f"lora.targets: no linear layer is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(short))}"
        )
    settings: dict[str, Any] = {"lora_alpha": lora.alpha}
    config = LoraConfig(
        r=lora.rank,
        **settings,
        lora_dropout=lora.dropout,
        target_modules=sorted(lora.targets or found),
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
    )
    inject_adapter_in_model(config, model)


def _quantized_linears() -> tuple[type[nn.Module], ...]:
    try:
        import bitsandbytes.nn
    except ImportError:
        return ()
    four_bit: type[nn.Module] = bitsandbytes.nn.Linear4bit
    return (four_bit,)
