"""Test images with question, answer and truth in one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_tune.constants import IMAGE_PLACEHOLDER


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows that `evaluate` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_answers(rows: list[dict[str, Any]], image_folder: Path, path: Path, count: int = 8) -> Path:
    """Draw `count` rows on different images, of the question types in turn. Returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, grid = pyplot.subplots(2, count // 2, figsize=(11, 7))
    for axes, row in zip(grid.flat, _choose(rows, count), strict=False):
        with Image.open(image_folder / row["image"][0]) as image:
            axes.imshow(image.convert("RGB"))
        axes.set_axis_off()
        question = row["question"].replace(IMAGE_PLACEHOLDER, "").strip()
        color = "#1a7f37" if row["correct"] else "#c62828"
        axes.set_title(f"{question}\nanswer: {row['answer']}\ntruth: {row['truth']}", fontsize=10, color=color)
    figure.tight_layout(h_pad=2.5)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _choose(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    kinds = sorted({r["type"] for r in rows})
    chosen: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(chosen) < count:
        kind = kinds[len(chosen) % len(kinds)]
        row = next((r for r in rows if r["type"] == kind and r["image"][0] not in seen), None)
        if row is None:
            break
        seen.add(row["image"][0])
        chosen.append(row)
    return chosen
