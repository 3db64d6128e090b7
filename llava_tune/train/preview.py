"""Sample answers while training: set questions on set images, printed and logged every N steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava_tune.config import Preview
from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.data import BadImage, ImageTransform
from llava_tune.data.tokens.layout import Layout
from llava_tune.errors import InputError
from llava_tune.model.generate import generate


class PreviewCallback(TrainerCallback):
    """Answers the questions on every rank (ZeRO-3 needs all of them) and lets rank 0 speak.

    Raises:
        InputError: an image can't be opened.
    """

    def __init__(
        self, config: Preview, layout: Layout, tokenizer: Any, transform: ImageTransform, work_dir: Path, main: bool
    ) -> None:
        self.config, self.layout, self.tokenizer, self.main = config, layout, tokenizer, main
        self.path = work_dir / "preview.txt"
        try:
            self.pixels = [transform.open(Path(image)) for image in config.images]
        except BadImage as error:
            raise InputError(f"preview.images: {error} ({', '.join(config.images)})") from error

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.config.every_steps or state.global_step % self.config.every_steps:
            return
        lines = [f"step {state.global_step}"]
        for image, pixels in zip(self.config.images, self.pixels, strict=True):
            for question in self.config.questions:
                prompt = self.layout.prompt([], f"{IMAGE_PLACEHOLDER}\n{question}")
                ids = generate(
                    model,
                    [prompt],
                    torch.stack([pixels]),
                    stop_ids=self.layout.stop_ids,
                    max_new_tokens=self.config.max_new_tokens,
                    synced=bool(getattr(args, "deepspeed", None)) and args.world_size > 1,
                )[0]
                lines.append(f"  {image}: {question} -> {self.tokenizer.decode(ids, skip_special_tokens=True)}")
        if self.main:
            text = "\n".join(lines)
            print(text, file=sys.stderr, flush=True)
            with self.path.open("a") as file:
                file.write(text + "\n")
