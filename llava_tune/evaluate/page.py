"""The worst answers with their images, as one self-contained HTML page that opens from a file."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.data.images import BadImage, opened
from llava_tune.evaluate.benchmarks import DATA_URI
from llava_tune.evaluate.metrics import Question
from llava_tune.paths import write_whole

SHOWN = 200
_THUMBNAIL = 224

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222;background:#fafafa}}
h1{{font-size:1.2rem;margin:0}} p{{color:#555}} select{{font:inherit;padding:.2rem}}
main{{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem;margin-top:1rem}}
article{{background:#fff;border:1px solid #ddd;border-radius:8px;padding:.8rem;overflow-wrap:anywhere}}
img{{max-width:100%;border-radius:4px;margin:0 .3rem .3rem 0}} dt{{color:#777;font-size:.8rem;margin-top:.4rem}}
dd{{margin:0;white-space:pre-wrap}} .answer{{color:#b00020}} .part{{color:#9a6700}} small{{color:#777}}
</style><h1>{title}</h1><p>{summary}</p>
<label>Show <select onchange="for(const a of document.querySelectorAll('article'))a.hidden=this.value&&a.dataset.kind!==this.value">
<option value="">all kinds</option>{options}</select></label><main>{cards}</main></html>
"""


def write_worst(
    path: Path, title: str, questions: Sequence[Question], answers: Sequence[str], rights: Sequence[float], folder: Path
) -> None:
    """Write the page: those least right first, SHOWN at most, the right ones not at all."""
    worst = sorted((i for i, right in enumerate(rights) if right < 1), key=lambda i: (float(rights[i]), i))
    shown = worst[:SHOWN]
    kinds = Counter(questions[i].kind for i in shown)
    options = "".join(f'<option value="{_text(k)}">{_text(k)} ({n})</option>' for k, n in sorted(kinds.items()))
    summary = f"{len(questions) - len(worst):,} of {len(questions):,} answers are right. "
    summary += f"The worst {len(shown):,} of the others:" if len(shown) < len(worst) else "The others:" if worst else ""
    cards = "".join(_card(questions[i], answers[i], rights[i], folder) for i in shown)
    write_whole(path, _PAGE.format(title=_text(title), summary=summary, options=options, cards=cards))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _card(question: Question, answer: str, right: float, folder: Path) -> str:
    asked = question.question.replace(IMAGE_PLACEHOLDER, "").strip()
    truth = question.truth
    if isinstance(truth, (list, tuple)) and truth and all(isinstance(t, str) for t in truth):
        truth = ", ".join(f"{t} x{n}" if n > 1 else t for t, n in Counter(truth).most_common())
    pictures = "".join(_picture(folder, image) for image in question.images)
    kind = "part" if right > 0 else "answer"
    partly = f" <small>({right:.0%} right)</small>" if right > 0 else ""
    return (
        f'<article data-kind="{_text(question.kind)}">{pictures}<dl><dt>question <small>{_text(question.id)}</small></dt>'
        f'<dd>{_text(asked)}</dd><dt>answer</dt><dd class="{kind}">{_text(answer) or "(empty)"}{partly}</dd>'
        f"<dt>right</dt><dd>{_text(truth)}</dd></dl></article>"
    )


def _picture(folder: Path, image: str) -> str:
    try:
        if image.startswith(DATA_URI):
            with Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))) as picture:
                return _thumbnail(picture)
        with opened(folder, image) as picture:
            return _thumbnail(picture)
    except (BadImage, OSError, ValueError) as error:
        return f"<small>{_text(image[:80])}: {_text(error)}</small>"


def _thumbnail(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">'
