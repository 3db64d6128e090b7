"""llava-tune export CHECKPOINT FOLDER [--format hf]"""

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
    format: Literal["hf"] = "hf"
    """hf: transformers' LlavaForConditionalGeneration, adapters merged."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights written."""
    image: tuple[str, ...] = ()
    """Pictures to prove it with; by default drawn ones."""
    push_to_hub: str | None = None
    """Name of a Hugging Face repository to upload the folder to, once it is proved."""


def main(arguments: list[str]) -> None:
    """Export and print what the gate found."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune export", use_underscores=False)
    from llava_tune.export.run import export_hf

    folder = Path(options.folder)
    report = export_hf(Path(options.checkpoint), folder, dtype=options.dtype, images=[Path(p) for p in options.image])
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {size / 1e6:,.1f} MB, {options.dtype}")
    print(
        f"opened by transformers in a process of its own, {report.questions} questions: token ids equal, pixels differ by at most "
        f"{report.pixels:.1e}, logits by {report.logits:.1e}, {report.greedy[0]} of {report.greedy[1]} greedy tokens agree"
    )
    if options.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(options.push_to_hub, exist_ok=True)
        print(api.upload_folder(repo_id=options.push_to_hub, folder_path=folder))
