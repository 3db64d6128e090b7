"""The held-out questions asked through transformers' pipeline, of an export, without llava-tune; compared with `evaluate`'s answers.

python benchmarks/easy_vqa/pipeline.py EXPORT ANSWERS.jsonl IMAGE_FOLDER [LIMIT]
"""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path
from typing import Any

from transformers import pipeline


def normalized(text: str) -> str:
    """As the score compares: lower case, without punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def main() -> None:
    export, answers, folder = sys.argv[1:4]
    rows = [json.loads(line) for line in Path(answers).read_text().splitlines()]
    rows = rows[: int(sys.argv[4])] if len(sys.argv) > 4 else rows
    ask: Any = pipeline("image-text-to-text", model=export, dtype="float32")
    same = theirs = ours = 0
    for row in rows:
        image = {"type": "image", "path": str(Path(folder) / row["image"][0])}
        question = {"type": "text", "text": row["question"].replace("<image>\n", "")}
        said = ask(text=[{"role": "user", "content": [image, question]}], max_new_tokens=32, return_full_text=False)
        answer = said[0]["generated_text"].strip()
        same += answer == row["answer"]
        theirs += normalized(answer) == normalized(row["truth"])
        ours += bool(row["correct"])
    assert not any(name.startswith("llava_tune") for name in sys.modules)
    n = len(rows)
    print(
        f"{n} questions: pipeline {theirs} right ({theirs / n:.2%}), llava-tune {ours} right; {same} answers are the same"
    )


if __name__ == "__main__":
    main()
