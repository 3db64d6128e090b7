"""Question files in LLaVA's format."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.data.formats import detect_format
from llava_tune.data.parts import rows_of
from llava_tune.data.records import BadRecord, parse_record
from llava_tune.data.sources import BadRow, open_sources
from llava_tune.errors import InputError
from llava_tune.evaluate.metrics import Question


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Each round of each record is a question; a record's "type" names its kind, else the question's first word does.

    A later round is asked alone, with the record's images, so that no answer is given away by an earlier round.

    Raises:
        InputError: missing, not LLaVA's format, or a record is wrong (named by its line).
    """
    questions: list[Question] = []
    for source in open_sources(str(path)):
        for number, row in rows_of(source, detect_format(source), None):
            questions += _questions_of(source.path, f"{source.unit} {number}", row)
    if not questions:
        raise InputError(f"{path}: holds no question")
    return questions[:limit] if limit else questions


def _questions_of(path: Path, where: str, data: Any) -> list[Question]:
    try:
        if isinstance(data, BadRow):
            raise data
        record = parse_record(data, where)
    except (BadRecord, BadRow) as error:
        raise InputError(f"{path}, {where}: {error}") from error
    found = []
    several = len(record.rounds) > 1
    for k, (question, truth) in enumerate(record.rounds):
        text = question.replace(IMAGE_PLACEHOLDER, "").strip()
        placed = "\n".join([*[IMAGE_PLACEHOLDER] * len(record.images), text])
        kind = str(data.get("type") or (text.split() or ["empty"])[0].lower())
        found.append(Question(f"{record.id}#{k}" if several else record.id, record.images, [], placed, truth, kind))
    return found


def swap_images(questions: list[Question], seed: int) -> list[Question]:
    """Each question with the images of another record: what is still right then, was not read off the image."""
    sets = [q.images for q in questions]
    distinct = sorted({tuple(s) for s in sets if s})
    if len(distinct) < 2:
        raise InputError("--swap-images needs questions on at least two different images")
    shuffled = distinct[:]
    random.Random(seed).shuffle(shuffled)
    following = dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))
    return [replace(q, images=list(following[tuple(q.images)])) if q.images else q for q in questions]
