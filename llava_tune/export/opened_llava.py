"""Opens an exported folder with LLaVA's own code (`llava`, PyPI's llava-torch) and says what it computes.

python opened_llava.py FOLDER QUESTIONS.json OUT.npz

Runs as a program of its own: nothing of llava_tune is imported here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaLlamaForCausalLM
from PIL import Image
from transformers import AutoTokenizer


def main() -> None:
    folder, questions, out = sys.argv[1:]
    asked = json.loads(Path(questions).read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = LlavaLlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    tower.float()
    found: dict[str, Any] = {}
    for k, question in enumerate(asked["questions"]):
        paths: list[str] = []
        said = []
        for message in question:
            parts = message["content"]
            pictures = [part["path"] for part in parts if part["type"] == "image"]
            texts = [part["text"] for part in parts if part["type"] == "text"]
            said.append({"role": message["role"], "content": "\n".join([DEFAULT_IMAGE_TOKEN] * len(pictures) + texts)})
            paths += pictures
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        opened = [Image.open(path).convert("RGB") for path in paths]
        pixels = (
            torch.as_tensor(np.array(process_images(opened, tower.image_processor, model.config))) if opened else None
        )
        with torch.inference_mode():
            logits = model(input_ids=ids, images=pixels, use_cache=False).logits[0]
        patches = tower.num_patches if opened else 1
        found[f"ids_{k}"] = np.repeat(ids[0].numpy(), np.where(ids[0].numpy() == IMAGE_TOKEN_INDEX, patches, 1))
        found[f"logits_{k}"] = logits.float().numpy()
        if pixels is not None:
            found[f"pixels_{k}"] = pixels.float().numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    main()
