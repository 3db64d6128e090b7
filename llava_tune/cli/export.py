"""llava-tune export CHECKPOINT FOLDER [--format hf|gguf|llava|adapter]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Options:
    """Write a checkpoint as other programs open it, and prove it there: FOLDER appears only if what the other program computes,
    from image file to logits, is what we compute."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a checkpoint, such as work_dirs/NAME/checkpoint-100."""
    folder: tyro.conf.Positional[str]
    """New folder to write."""
    format: Literal["hf", "gguf", "llava", "adapter"] = "hf"
    """hf: transformers' LlavaForConditionalGeneration, adapters merged. gguf: for llama.cpp. llava: for LLaVA's own code. adapter: the
    model without the language model's LoRA, as transformers opens it, and the LoRA for peft."""
    dtype: Literal["bf16", "fp32", "fp16", "q8_0"] | None = None
    """Of the weights written: bf16 (default) or fp32; of gguf fp16 (default), fp32 or q8_0."""
    image: tuple[str, ...] = ()
    """Pictures to prove it with; by default drawn ones."""
    push_to_hub: str | None = None
    """Name of a Hugging Face repository to upload the folder to, once it is proved."""


def main(arguments: list[str]) -> None:
    """Export and print what the gate found."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune export", use_underscores=False)
    from llava_tune.export.run import export

    folder = Path(options.folder)
    images = [Path(p) for p in options.image]
    said = export(Path(options.checkpoint), folder, format=options.format, dtype=options.dtype, images=images)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {size / 1e6:,.1f} MB\n{said}")
    if options.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(options.push_to_hub, exist_ok=True)
        print(api.upload_folder(repo_id=options.push_to_hub, folder_path=folder))
