"""Scores of answers."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space (SQuAD's normalisation, arXiv:1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def is_correct(answer: str, truth: str) -> bool:
    """Exact match after `normalize`."""
    return normalize(answer) == normalize(truth)


@dataclass(frozen=True)
class Question:
    """One question to be answered.

    Attributes:
        id: of the record, with the round's number where a record asks several.
        images: paths below the image folder, or `data:` URIs.
        rounds: (question, answer) of the record before this one.
        question: with its image placeholders.
        truth: the right answer; of a benchmark, what its score needs: what each of ten people answered, or a box.
        kind: the question's type, for the table.
    """

    id: str
    images: list[str]
    rounds: list[tuple[str, str]]
    question: str
    truth: Any
    kind: str


def accuracy(answers: Sequence[str], questions: Sequence[Question]) -> dict[str, tuple[int, int]]:
    """(right, asked) of each question type, and of 'all'."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for answer, question in zip(answers, questions, strict=True):
        right = is_correct(answer, question.truth)
        for kind in (question.kind, "all"):
            counts[kind][0] += right
            counts[kind][1] += 1
    return {kind: (right, asked) for kind, (right, asked) in counts.items()}


def question_alone_accuracy(questions: Sequence[Question]) -> float:
    """What is reached without the image at best: for each question's text, always its commonest answer here."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for q in questions:
        answers[q.question][normalize(q.truth)] += 1
    return sum(c.most_common(1)[0][1] for c in answers.values()) / max(len(questions), 1)
