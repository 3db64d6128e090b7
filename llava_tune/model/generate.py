"""Answers of a Llava to prompts with images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_tune.constants import IMAGE_TOKEN_INDEX
from llava_tune.model.llava import Llava


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0: always the likeliest; else drawn after the logits are divided by it.
        top_p: drawn among the likeliest tokens that make up this share (nucleus sampling, arXiv:1904.09751).
        seed: makes drawn answers repeatable; None: they differ each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Of transformers' `generate`; seeds torch's random numbers."""
        if self.temperature <= 0:
            return {"do_sample": False}
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


GREEDY = Sampling()


@torch.inference_mode()
def generate(
    llava: Llava,
    prompts: list[list[int]],
    pixel_values: Tensor | None,
    *,
    stop_ids: list[int],
    max_new_tokens: int,
    streamer: Any = None,
    synced: bool = False,
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """New token ids of each prompt, up to and without the first stop id.

    Args:
        prompts: token ids; an image is one IMAGE_TOKEN_INDEX.
        pixel_values: float [images, 3, size, size] in the order of the placeholders; None: no prompt has an image.
        stop_ids: ids that end an answer.
        streamer: a transformers streamer, for one prompt.
        synced: all ranks generate together (ZeRO-3).
        sampling: how a token is chosen.
    """
    device = llava.llm.get_input_embeddings().weight.device
    tokens = llava.vision.tokens if llava.vision is not None else 1
    rows = [np.repeat(p, np.where(np.array(p) == IMAGE_TOKEN_INDEX, tokens, 1)) for p in prompts]
    length = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):  # on the left, so that all answers start in the same column
        ids[i, length - len(row) :] = torch.from_numpy(row)
        mask[i, length - len(row) :] = 1
    pixels = None if pixel_values is None else pixel_values.to(device)
    was_training = llava.training
    llava.eval()
    # While training in bf16, frozen parts are bf16 and trained ones fp32: the products are bf16's, as in training.
    mixed = len({p.dtype for p in llava.parameters() if p.is_floating_point()}) > 1
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            out = llava.llm.generate(
                inputs_embeds=llava.embed(ids.to(device), pixels),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                **sampling.arguments(),
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
                streamer=streamer,
                synced_gpus=synced,
                use_cache=True,
            )
    finally:
        llava.train(was_training)
    return [_until(row, stop_ids) for row in out.tolist()]


def _until(ids: list[int], stop_ids: list[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in stop_ids:
            return ids[:i]
    return ids
