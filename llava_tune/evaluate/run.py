"""Answer a question file and score the answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava_tune.data.images import BadImage
from llava_tune.errors import InputError
from llava_tune.evaluate.answer import Answerer
from llava_tune.evaluate.benchmarks import BENCHMARKS, DATA_URI, exactly_right, read_benchmark
from llava_tune.evaluate.journal import Journal
from llava_tune.evaluate.metrics import Question, accuracy, question_alone_accuracy
from llava_tune.evaluate.page import write_worst
from llava_tune.evaluate.questions import read_questions, swap_images
from llava_tune.model.factory import WEIGHTS, checkpoint_folder
from llava_tune.model.generate import GREEDY, Sampling
from llava_tune.paths import write_whole

_PATIENCE = 1800.0
"""Seconds that rank 0 waits without a new answer of another."""


@dataclass(frozen=True)
class Evaluated:
    """Scores of a question file.

    Attributes:
        accuracy: (right, asked) of each question type and of 'all'.
        question_alone: share that the best answer by the question's text alone gets.
        swapped: share that the model gets with each image swapped for another, if that was asked for.
        answers_file: every answer, one JSON object a line; beside it -worst.html, the page of the worst.
        scores: of a benchmark, by name, the main one first; else empty.
    """

    accuracy: dict[str, tuple[int, int]]
    question_alone: float
    swapped: float | None
    answers_file: Path
    scores: dict[str, float] = field(default_factory=dict)


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
    benchmark: str | None = None,
    annotations: str | Path | None = None,
    sampling: Sampling = GREEDY,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> Evaluated | None:
    """Answer every question, write the answers with a page of the worst, and score them.

    Answers are kept as they come (`Journal`): a run that was killed goes on where it was, and asks nothing twice; the next one may have
    another number of processes.

    Args:
        checkpoint: a llava-tune checkpoint.
        data: LLaVA JSON or JSONL; each round of a record is a question of its own.
        image_folder: what the images' paths start from.
        output: where the answers go; None: answers.jsonl in the checkpoint's folder.
        swap: also answer with each image swapped for another.
        benchmark: which of `BENCHMARKS` the data is; None: LLaVA's format, exact match.
        annotations: the benchmark's answers, where they are a file of their own.
        sampling: how a token is chosen.
        rank, world_size: several processes that see the same disk answer a share each; rank 0 waits for the others and scores.
        report: called with (answered, of how many).

    Returns:
        The scores; None on other ranks than 0.

    Raises:
        InputError: wrong checkpoint, questions or images.
    """
    checkpoint = checkpoint_folder(checkpoint)
    if benchmark is None:
        questions = read_questions(Path(data), limit)
    else:
        questions = read_benchmark(benchmark, Path(data), Path(annotations) if annotations else None, limit)
    inside = [image for q in questions for image in q.images if not image.startswith(DATA_URI)]
    if image_folder is None and inside:
        raise InputError(f"{data} has images: say where they are with --image-folder")
    folder = Path(image_folder) if image_folder is not None else Path()
    if not folder.is_dir():
        raise InputError(f"--image-folder {folder}: no such folder")
    path = Path(output) if output else Path(checkpoint) / "answers.jsonl"
    answerer = Answerer(checkpoint)
    total = len(questions) * (2 if swap else 1)

    def answer_all(asked: list[Question], journal: Journal, before: int) -> list[str]:
        def count(done: int) -> None:
            if report:
                report(before + done, total)

        _answer_share(answerer, asked, folder, batch_size, max_new_tokens, sampling, journal, (rank, world_size), count)
        if rank:
            return []
        journal.wait(len(asked), _PATIENCE, count)
        return [journal.answers[i] for i in range(len(asked))]

    how = [sampling.temperature, sampling.top_p, sampling.seed] if sampling != GREEDY else []
    key = [_identity(Path(checkpoint) / WEIGHTS), _identity(Path(data)), benchmark, limit, max_new_tokens, *how]
    journal = Journal(path, key, rank)
    others = Journal(path.with_name(f"{path.stem}-swapped{path.suffix}"), key, rank) if swap else None
    answers = answer_all(questions, journal, 0)
    again = answer_all(swap_images(questions, seed=0), others, len(questions)) if others else []
    if rank:
        return None
    right = BENCHMARKS[benchmark].right if benchmark else exactly_right
    rights = [right(q, a) for q, a in zip(questions, answers, strict=True)]
    write_whole(path, "".join(_line(q, a, r) for q, a, r in zip(questions, answers, rights, strict=True)))
    swapped = None
    if others:
        swapped = sum(right(q, a) for q, a in zip(questions, again, strict=True)) / len(questions)
        others.close()
    journal.close()
    page = path.with_name(f"{path.stem}-worst.html")
    write_worst(page, f"{checkpoint} on {data}", questions, answers, rights, folder)
    if benchmark is not None:
        scores = BENCHMARKS[benchmark].score(list(zip(questions, answers, strict=True)))
        facts = {
            "benchmark": benchmark,
            "scores": scores,
            "questions": len(questions),
            "metric": BENCHMARKS[benchmark].cite,
        }
        write_whole(path.with_name(f"{path.stem}-scores.json"), json.dumps(facts, indent=1))
        return Evaluated({}, 0.0, swapped, path, scores)
    found = accuracy(answers, questions)
    figures = {kind: right / asked for kind, (right, asked) in found.items()}
    facts = {"benchmark": Path(data).name, "scores": figures, "questions": len(questions), "metric": "exact match"}
    write_whole(path.with_name(f"{path.stem}-scores.json"), json.dumps(facts, indent=1))
    return Evaluated(found, question_alone_accuracy(questions), swapped, path)


def _identity(path: Path) -> list[object]:
    """What tells that a file is another one; of a pattern, the pattern."""
    if not path.exists():
        return [str(path)]
    known = path.stat()
    return [str(path.resolve()), known.st_size, known.st_mtime_ns]


def _line(question: Question, answer: str, right: float) -> str:
    row = {
        "id": question.id,
        "image": [image[:64] for image in question.images] if _embedded(question) else question.images,
        "question": question.question,
        "answer": answer,
        "truth": question.truth,
        "type": question.kind,
        "correct": right if 0 < right < 1 else bool(right),
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _embedded(question: Question) -> bool:
    return any(image.startswith(DATA_URI) for image in question.images)


def _answer_share(
    answerer: Answerer,
    questions: list[Question],
    folder: Path,
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    journal: Journal,
    share: tuple[int, int],
    report: Callable[[int], None],
) -> None:
    """Answer every share[1]-th question from share[0] on, those of like length together."""
    prompts = [answerer.prompt(q.rounds, q.question) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(prompts[i]), len(questions[i].images)))
    order = [i for i in order[share[0] :: share[1]] if i not in journal.answers]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        images = [_load(answerer, folder, questions[i].id, image) for i in batch for image in questions[i].images]
        found = answerer.answer([prompts[i] for i in batch], images, max_new_tokens, sampling=sampling)
        journal.add(dict(zip(batch, found, strict=True)))
        report(len(journal.answers))


def _load(answerer: Answerer, folder: Path, identity: str, image: str) -> Any:
    try:
        if not image.startswith(DATA_URI):
            return answerer.transform.load(folder, image)
        with Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2], validate=True))) as opened:
            return answerer.transform(opened)
    except (BadImage, OSError, ValueError, Image.DecompressionBombError) as error:
        shown = image if not image.startswith(DATA_URI) else "in the file"
        raise InputError(f"question {identity}: image {shown}: {error}") from error
