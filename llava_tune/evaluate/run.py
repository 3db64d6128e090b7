"""Answer a question file and score the answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from llava_tune.data.images import BadImage
from llava_tune.errors import InputError
from llava_tune.evaluate.answer import Answerer
from llava_tune.evaluate.benchmarks import BENCHMARKS, DATA_URI, exactly_right, read_benchmark
from llava_tune.evaluate.metrics import Question, accuracy, question_alone_accuracy
from llava_tune.evaluate.questions import read_questions, swap_images
from llava_tune.model.factory import WEIGHTS
from llava_tune.paths import write_whole


@dataclass(frozen=True)
class Evaluated:
    """Scores of a question file.

    Attributes:
        accuracy: (right, asked) of each question type and of 'all'.
        question_alone: share that the best answer by the question's text alone gets.
        swapped: share that the model gets with each image swapped for another, if that was asked for.
        answers_file: every answer, one JSON object a line.
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
    report: Callable[[int, int], None] | None = None,
) -> Evaluated:
    """Answer every question greedily, write the answers, and score them.

    Answers are kept as they come (`Journal`): a run that was killed goes on where it was, and asks nothing twice.

    Args:
        checkpoint: a llava-tune checkpoint.
        data: LLaVA JSON or JSONL; each round of a record is a question of its own.
        image_folder: what the images' paths start from.
        output: where the answers go; None: answers.jsonl in the checkpoint's folder.
        swap: also answer with each image swapped for another.
        benchmark: which of `BENCHMARKS` the data is; None: LLaVA's format, exact match.
        annotations: the benchmark's answers, where they are a file of their own.
        report: called with (answered, of how many).

    Raises:
        InputError: wrong checkpoint, questions or images.
    """
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

        return _answer_all(answerer, asked, folder, batch_size, max_new_tokens, journal, count)

    key = [_identity(Path(checkpoint) / WEIGHTS), _identity(Path(data)), benchmark, limit, max_new_tokens]
    journal = Journal(path, key)
    answers = answer_all(questions, journal, 0)
    right = BENCHMARKS[benchmark].right if benchmark else exactly_right
    rights = [right(q, a) for q, a in zip(questions, answers, strict=True)]
    write_whole(path, "".join(_line(q, a, r) for q, a, r in zip(questions, answers, rights, strict=True)))
    swapped = None
    if swap:
        others = Journal(path.with_name(f"{path.stem}-swapped{path.suffix}"), key)
        again = answer_all(swap_images(questions, seed=0), others, len(questions))
        swapped = sum(right(q, a) for q, a in zip(questions, again, strict=True)) / len(questions)
        others.close()
    journal.close()
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
    return Evaluated(accuracy(answers, questions), question_alone_accuracy(questions), swapped, path)


def _identity(path: Path) -> list[object]:
    """What tells that a file is another one; of a pattern, the pattern."""
    if not path.exists():
        return [str(path)]
    known = path.stat()
    return [str(path.resolve()), known.st_size, known.st_mtime_ns]


class Journal:
    """Answers of a run that has not ended, one JSON line each, beside the file that will hold them all.

    Args:
        path: that file.
        key: what an earlier run must share for its answers to count.
    """

    def __init__(self, path: Path, key: Sequence[object]) -> None:
        self.path = path.with_name(f"{path.name}.unfinished")
        self.answers: dict[int, str] = {}  # by the question's place: ids may come twice
        head = json.dumps({"key": key})
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        if lines[:1] == [head]:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the line that a kill cut off
                self.answers[entry["question"]] = entry["answer"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps({"question": i, "answer": a}, ensure_ascii=False) for i, a in self.answers.items()]
        write_whole(self.path, "".join(f"{line}\n" for line in [head, *kept]))

    def add(self, answers: dict[int, str]) -> None:
        """Keep some answers, by their questions' places."""
        self.answers |= answers
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"question": i, "answer": a}, ensure_ascii=False) + "\n" for i, a in answers.items()
            )

    def close(self) -> None:
        """All answers are in their file: remove this one."""
        self.path.unlink(missing_ok=True)


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


def _answer_all(
    answerer: Answerer,
    questions: list[Question],
    folder: Path,
    batch_size: int,
    max_new_tokens: int,
    journal: Journal,
    report: Callable[[int], None],
) -> list[str]:
    """Answers in the questions' order; questions of like length are answered together."""
    prompts = [answerer.prompt(q.rounds, q.question) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(prompts[i]), len(questions[i].images)))
    order = [i for i in order if i not in journal.answers]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        images = [_load(answerer, folder, questions[i].id, image) for i in batch for image in questions[i].images]
        found = answerer.answer([prompts[i] for i in batch], images, max_new_tokens)
        journal.add(dict(zip(batch, found, strict=True)))
        report(len(journal.answers))
    return [journal.answers[i] for i in range(len(questions))]


def _load(answerer: Answerer, folder: Path, identity: str, image: str) -> Any:
    try:
        if not image.startswith(DATA_URI):
            return answerer.transform.load(folder, image)
        with Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2], validate=True))) as opened:
            return answerer.transform(opened)
    except (BadImage, OSError, ValueError, Image.DecompressionBombError) as error:
        shown = image if not image.startswith(DATA_URI) else "in the file"
        raise InputError(f"question {identity}: image {shown}: {error}") from error
