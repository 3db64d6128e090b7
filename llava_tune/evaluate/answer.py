"""A checkpoint that answers: model, layout, tokenizer and preprocessing in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.data.images import ImageTransform, image_transform
from llava_tune.data.plan import make_layout
from llava_tune.data.tokens.layout import Layout
from llava_tune.data.tokens.tokenizer import load_tokenizer
from llava_tune.model.factory import checkpoint_folder, load_checkpoint
from llava_tune.model.generate import GREEDY, Sampling, generate


class Answerer:
    """Answers questions about images with a trained checkpoint.

    Args:
        dtype: of the weights; None: bf16 on a GPU that has it, else fp32.

    Raises:
        InputError: not a checkpoint.
    """

    def __init__(self, checkpoint: str | Path, dtype: torch.dtype | None = None) -> None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = torch.bfloat16 if device != "cpu" and torch.cuda.is_bf16_supported() else torch.float32
        self.folder = checkpoint_folder(checkpoint)
        llava, run = load_checkpoint(self.folder, dtype=dtype)
        self.llava = llava.to(device)
        self.run = run
        self.tokenizer: Any = load_tokenizer(run.model.llm.tokenizer or run.model.llm.name)
        self.layout = Layout(make_layout(run)[0])
        self.transform: ImageTransform = image_transform(run.model.vision, run.dataset.pad_image_to_square)

    def prompt(self, rounds: list[tuple[str, str]], question: str, system: str = "") -> list[int]:
        """Token ids of a prompt; see Layout.prompt."""
        return self.layout.prompt(rounds, question, system)

    def answer(
        self,
        prompts: list[list[int]],
        images: list[Tensor],
        max_new_tokens: int,
        streamer: Any = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """Answers.

        Args:
            prompts: of `prompt`.
            images: float [3, size, size], in the order of the prompts' placeholders.
            streamer: a transformers streamer, for one prompt.
            sampling: how a token is chosen.
        """
        ids = generate(
            self.llava,
            prompts,
            torch.stack(images) if images else None,
            stop_ids=self.layout.stop_ids,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            sampling=sampling,
        )
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    def ask(self, question: str, images: list[Path], max_new_tokens: int = 256) -> str:
        """One question about image files."""
        text = "\n".join([*[IMAGE_PLACEHOLDER] * len(images), question])
        pixels = [self.transform.open(path) for path in images]
        return self.answer([self.prompt([], text)], pixels, max_new_tokens)[0]
