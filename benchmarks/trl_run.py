"""One run of TRL's SFTTrainer on an exported model, as a user would set it up; benchmarks/train.py starts it.

python benchmarks/trl_run.py MODEL DATA.json IMAGE_FOLDER OUT --batch 4 --accumulate 4 --steps 8

Writes JSON: useful tokens a second (of samples, image patches counted, padding not), median over the steps but the first two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer


def rows_of(data: Path, folder: Path) -> Dataset:
    """LLaVA records as TRL's messages and images."""
    rows = []
    for record in json.loads(data.read_text()):
        messages = []
        for said in record["conversations"]:
            role = "user" if said["from"] == "human" else "assistant"
            text = said["value"].replace("<image>\n", "")
            parts: list[dict[str, Any]] = [{"type": "image"}] if "<image>" in said["value"] else []
            messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
        images = [Image.open(folder / record["image"])] if "image" in record else []
        rows.append({"messages": messages, "images": images})
    return Dataset.from_list(rows)


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.monotonic())


class Counting(SFTTrainer):
    """Counts the tokens that are no padding."""

    tokens: list[int]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.tokens.append(sum(int(batch["attention_mask"].sum()) for batch in batches))
        return batches, items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "images", "out"):
        parser.add_argument(name)
    for name in ("batch", "accumulate", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    clock = Clock()
    model = AutoModelForImageTextToText.from_pretrained(options.model)
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    trainer = Counting(
        model=model,
        args=SFTConfig(
            output_dir=str(Path(options.out).with_suffix("")),
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            max_steps=options.steps,
            learning_rate=1e-4,
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            dataloader_num_workers=1,
        ),
        train_dataset=rows_of(Path(options.data), Path(options.images)),
        processing_class=AutoProcessor.from_pretrained(options.model),
        callbacks=[clock],
    )
    trainer.tokens = []
    trainer.train()
    seconds = [b - a for a, b in zip(clock.ends[1:], clock.ends[2:], strict=False)]
    rates = [tokens / took for tokens, took in zip(trainer.tokens[2:], seconds, strict=False)]
    Path(options.out).write_text(json.dumps({"tokens_per_second": statistics.median(rates)}))


if __name__ == "__main__":
    main()
