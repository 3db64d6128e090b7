"""Greedy answers of a Llava to prompts with images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_tune.constants import IMAGE_TOKEN_INDEX
from llava_tune.model.llava import Llava


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
) -> list[list[int]]:
    """New token ids of each prompt, up to and without the first stop id.

    Args:
        prompts: token ids; an image is one IMAGE_TOKEN_INDEX.
        pixel_values: float [images, 3, size, size] in the order of the placeholders; None: no prompt has an image.
        stop_ids: ids that end an answer.
        streamer: a transformers streamer, for one prompt.
        synced: all ranks generate together (ZeRO-3).
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
    try:
        out = llava.llm.generate(
            inputs_embeds=llava.embed(ids.to(device), pixels),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
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
