"""Turn easy-VQA (https://github.com/vzhou842/easy-VQA, MIT) into the files of the recipe beside this one.

python benchmarks/easy_vqa/make_data.py ../shared/data/easy_vqa work_dirs/easy_vqa

Images 0-3599 are for training, 3600-3999 are held out. Captions are made from the training answers alone; a training
conversation is cut into records of two rounds, so that few answers can be read off an earlier round.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.demo.small import texts_of, write_language_model, write_vision_tower
from llava_tune.paths import write_whole

TRAINING_IMAGES = 3600
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "gray", "red", "blue", "green", "teal", "brown", "yellow")


def caption(rounds: list[tuple[str, str]]) -> str | None:
    """What the answers say the image shows; None if they leave the color or the shape open."""
    shape = color = None
    for question, answer in rounds:
        denies = re.search(r"\b(not|no)\b", question.lower()) is not None
        present = answer == ("no" if denies else "yes")
        for word in re.findall(r"\w+", question.lower()):
            # "What color is the circle?" names the shape; "Is there not a circle?" does if the answer is no.
            if word in SHAPES and (question.startswith("What") or present):
                shape = word
            if word in COLORS and (question.startswith("What") or present):
                color = word
        shape = answer if answer in SHAPES else shape
        color = answer if answer in COLORS else color
    return f"a {color} {shape}" if shape and color else None


def record(identity: str, image: str, rounds: list[tuple[str, str]]) -> dict[str, Any]:
    """A LLaVA record."""
    messages = []
    for k, (question, answer) in enumerate(rounds):
        messages.append({"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{question}" if k == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    return {"id": identity, "image": image, "conversations": messages}


def rounds_of(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer) pairs without the placeholder."""
    texts = [m["value"].replace(IMAGE_PLACEHOLDER, "").strip() for m in raw["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    rng = random.Random(0)
    files: dict[str, list[dict[str, Any]]] = {"captions": [], "train": [], "test": []}
    for raw in json.loads((source / "easy_vqa_train.json").read_text()):
        rounds = rounds_of(raw)
        if int(Path(raw["image"]).stem) >= TRAINING_IMAGES:
            files["test"].append(record(raw["id"], raw["image"], rounds))
            continue
        if says := caption(rounds):
            files["captions"].append(record(raw["id"], raw["image"], [("What is this?", says)]))
        rng.shuffle(rounds)
        for k in range(0, len(rounds), 2):
            files["train"].append(record(f"{raw['id']}-{k}", raw["image"], rounds[k : k + 2]))
    for stem, records in files.items():
        write_whole(target / f"{stem}.json", json.dumps(records, indent=1))
        print(f"{stem}: {len(records):,} records")
    texts = texts_of([target / "captions.json", target / "train.json"])
    write_language_model(target / "llm", texts, vocab_size=384, width=128, layers=3, heads=4)
    write_vision_tower(target / "vision.json", timm_model=None)


if __name__ == "__main__":
    main()
