"""Samples as one self-contained HTML page, which opens from a file and asks nothing of a server."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from llava_tune.data.images import BadImage, opened
from llava_tune.data.review.samples import Sample, Samples

_THUMBNAIL = 192
_BINS = 40


def write_page(samples: Samples, path: Path) -> None:
    """Write the page."""
    from llava_tune.paths import write_whole

    data = {
        "title": samples.title,
        "total": samples.total,
        "partial": samples.partial,
        "maxLength": samples.max_length,
        "sets": [_set(name, samples) for name in samples.sums],
        "samples": [_sample(s, samples.folders.get(s.data_set)) for s in samples.chosen],
    }
    text = json.dumps(data, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\!--")
    page = resources.files("llava_tune.data.review").joinpath("page.html").read_text(encoding="utf-8")
    write_whole(path, page.replace("{{title}}", html.escape(samples.title)).replace("{{data}}", text))


def _set(name: str, samples: Samples) -> dict[str, Any]:
    lengths = samples.lengths[name]
    top = max(int(some.max(initial=1)) for some in samples.lengths.values())  # one scale for all data sets
    counts, edges = np.histogram(lengths, bins=min(_BINS, top), range=(0, top + 1))
    return {"name": name, **samples.sums[name], "counts": counts.tolist(), "edges": [round(float(e)) for e in edges]}


def _sample(sample: Sample, folder: Path | None) -> dict[str, Any]:
    return {
        "row": sample.row,
        "id": sample.id,
        "set": sample.data_set,
        "tokens": sample.tokens,
        "supervised": sample.supervised,
        "cut": sample.cut,
        "pieces": [[p.text, int(p.supervised), p.image, int(p.control)] for p in sample.pieces],
        "images": [
            {"name": p.reference, "size": p.size, "problem": p.problem, "src": _thumbnail(folder, p.reference)}
            for p in sample.pictures
        ],
    }


def _thumbnail(folder: Path | None, reference: str) -> str | None:
    if folder is None:
        return None
    try:
        with opened(folder, reference) as image:
            image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
            small = image.convert("RGB")
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    except BadImage:
        return None
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
