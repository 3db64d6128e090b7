"""README.md of an export for transformers: use, data, scores, recipe."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llava_tune import __version__
from llava_tune.config import to_json
from llava_tune.constants import BEST, DATA_FINGERPRINT
from llava_tune.evaluate.answer import Answerer


def model_card(answerer: Answerer, dtype: torch.dtype) -> str:
    """README.md of an export: how it was made and scored, and how to use it."""
    run = answerer.run
    vision = run.model.vision
    task = "image-text-to-text" if vision else "text-generation"
    parts = f"vision tower: {vision.name}; projector: {run.model.projector.kind}; " if vision else ""
    image = '{"type": "image", "path": "picture.jpg"}, ' if vision else ""
    argument = "text=" if vision else ""
    return f"""---
library_name: transformers
pipeline_tag: {task}
tags: [llava, llava-tune]
---
# Trained with llava-tune {__version__}

- {parts}language model: {run.model.llm.name}
- chat template: {run.dataset.template}; weights: {str(dtype).removeprefix("torch.")}; adapters merged: {bool(run.model.llm.lora.rank)}

```python
from transformers import pipeline

ask = pipeline("{task}", model=FOLDER)
message = {{"role": "user", "content": [{image}{{"type": "text", "text": "What is this?"}}]}}
print(ask({argument}[message], max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

`gate.json` says how this folder was compared with the model it was made from.

{_data(answerer.folder)}{_scores(answerer.folder)}## Recipe
```json
{to_json(run)}
```
"""


def _data(checkpoint: Path) -> str:
    """What the checkpoint was trained on, with the hash of each file."""
    path = checkpoint / DATA_FINGERPRINT
    if not path.is_file():
        return ""
    known = json.loads(path.read_bytes())
    rows = [f"| {s['name']} | {s['bytes']:,} | {s.get('xxh3', '')} |" for s in known["sources"]]
    head = f"## Data\n{known['samples']:,} samples, max_length {known['spec']['max_length']}\n\n| File | Bytes | xxh3 |\n|-|-:|-|\n"
    return head + "\n".join(rows) + "\n\n"


def _scores(checkpoint: Path) -> str:
    """What `evaluate` and the evaluation while training found."""
    rows = []
    for path in sorted([*checkpoint.glob("*-scores.json"), *(checkpoint.parent / "evaluation").glob("*-scores.json")]):
        found = json.loads(path.read_bytes())
        rows += [
            f"| {found['benchmark']}: {name} | {value:.4g} | {found['questions']:,} |"
            for name, value in found["scores"].items()
        ]
    best = checkpoint.parent / BEST
    if best.is_file() and (found := json.loads(best.read_bytes()))["checkpoint"] == checkpoint.name:
        rows.append(f"| while training (the best) | {found['score']:.4g} | |")
    return "## Scores\n| | Score | Questions |\n|-|-:|-:|\n" + "\n".join(rows) + "\n\n" if rows else ""
