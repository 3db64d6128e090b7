"""Opens an exported folder as its users do, with transformers (and peft, for one with an adapter) alone, and says what it computes.

python opened.py FOLDER QUESTIONS.json OUT.npz

Runs as a program of its own: nothing of llava_tune is imported here, so that what it finds is what any other program finds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def main() -> None:
    folder, questions, out = sys.argv[1:]
    adapter = Path(folder) / "adapter"
    if adapter.is_dir():
        folder = str(Path(folder) / "base")
    torch.manual_seed(0)
    processor: Any
    model: Any
    if (Path(folder) / "processor_config.json").is_file():
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        processor = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter.is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    found: dict[str, Any] = {}
    asked = json.loads(Path(questions).read_text())
    for k, question in enumerate(asked["questions"]):
        inputs = processor.apply_chat_template(
            question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = model(**inputs).logits[0]
            new = model.generate(**inputs, max_new_tokens=asked["max_new_tokens"], do_sample=False)
        found[f"ids_{k}"] = inputs["input_ids"][0].numpy()
        found[f"logits_{k}"] = logits.float().numpy()
        found[f"new_{k}"] = new[0, inputs["input_ids"].shape[1] :].numpy()
        if "pixel_values" in inputs:
            found[f"pixels_{k}"] = inputs["pixel_values"].float().numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    main()
