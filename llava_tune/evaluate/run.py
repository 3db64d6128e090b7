"""Answer a question file and score the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava_tune.data.images import BadImage
from llava_tune.errors import InputError
from llava_tune.evaluate.answer import Answerer
from llava_tune.evaluate.metrics import Question, accuracy, is_correct, question_alone_accuracy
from llava_tune.evaluate.questions import read_questions, swap_images
from llava_tune.paths import write_whole


@dataclass(frozen=True)
class Evaluated:
    """Scores of a question file.

    Attributes:
        accuracy: (right, asked) of each question type and of 'all'.
        question_alone: share that the best answer by the question's text alone gets.
        swapped: share that the model gets with each image swapped for another, if that was asked for.
        answers_file: every answer, one JSON object a line.
    """

    accuracy: dict[str, tuple[int, int]]
    question_alone: float
    swapped: float | None
    answers_file: Path


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    image_folder: str | Path | None,
    *,
    output: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    limit: int | None = None,
    swap: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> Evaluated:
    """Answer every question greedily, write the answers, and count exact matches.

    Args:
        checkpoint: a llava-tune checkpoint.
        data: LLaVA JSON or JSONL; each round of a record is a question of its own.
        image_folder: what the images' paths start from.
        output: where the answers go; None: answers.jsonl in the checkpoint's folder.
        swap: also answer with each image swapped for another.
        report: called with (answered, of how many).

    Raises:
        InputError: wrong checkpoint, questions or images.
    """
    questions = read_questions(Path(data), limit)
    if image_folder is None and any(q.images for q in questions):
        raise InputError(f"{data} has images: say where they are with --image-folder")
    folder = Path(image_folder) if image_folder is not None else Path()
    if not folder.is_dir():
        raise InputError(f"--image-folder {folder}: no such folder")
    answerer = Answerer(checkpoint)
    total = len(questions) * (2 if swap else 1)

    def count(done: int) -> None:
        if report:
            report(done, total)

    answers = _answer_all(answerer, questions, folder, batch_size, max_new_tokens, count)
    path = Path(output) if output else Path(checkpoint) / "answers.jsonl"
    write_whole(path, "".join(_line(q, a) for q, a in zip(questions, answers, strict=True)))
    swapped = None
    if swap:
        others = swap_images(questions, seed=0)
        again = _answer_all(answerer, others, folder, batch_size, max_new_tokens, lambda n: count(len(questions) + n))
        right, asked = accuracy(again, questions)["all"]
        swapped = right / asked
    return Evaluated(accuracy(answers, questions), question_alone_accuracy(questions), swapped, path)


def _line(question: Question, answer: str) -> str:
    row = {
        "id": question.id,
        "image": question.images,
        "question": question.question,
        "answer": answer,
        "truth": question.truth,
        "type": question.kind,
        "correct": is_correct(answer, question.truth),
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _answer_all(
    answerer: Answerer,
    questions: list[Question],
    folder: Path,
    batch_size: int,
    max_new_tokens: int,
    report: Callable[[int], None],
) -> list[str]:
    """Answers in the questions' order; questions of like length are answered together."""
    prompts = [answerer.prompt(q.rounds, q.question) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(prompts[i]), len(questions[i].images)))
    answers = [""] * len(questions)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        images = []
        for i in batch:
            for image in questions[i].images:
                try:
                    images.append(answerer.transform.load(folder, image))
                except BadImage as error:
                    raise InputError(f"question {questions[i].id}: image {image}: {error}") from error
        for i, answer in zip(batch, answerer.answer([prompts[i] for i in batch], images, max_new_tokens), strict=True):
            answers[i] = answer
        report(min(start + batch_size, len(order)))
    return answers
