"""Public benchmarks, read as their authors publish them and scored as their papers define it."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.errors import InputError
from llava_tune.evaluate.metrics import Question, is_correct, normalize
from llava_tune.evaluate.vqa import vqa_accuracy

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGH"
DATA_URI = "data:"
Answered = Sequence[tuple[Question, str]]
Scores = dict[str, float]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        read: its questions from a file or folder (and, for VQAv2, its annotations file).
        score: its figures from 0 to 1 (MME: points), the one that papers report first.
        right: how right one answer is, from 0 to 1.
        cite: where both are defined.
    """

    read: Callable[[Path, Path | None], list[Question]]
    score: Callable[[Answered], Scores]
    right: Callable[[Question, str], float]
    cite: str


def _ask(text: str) -> str:
    return f"{IMAGE_PLACEHOLDER}\n{text}"


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected {what}: {error}") from error


def _json_lines(path: Path, what: str) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected {what}: {error}") from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _by_kind(right: Callable[[Question, str], float]) -> Callable[[Answered], Scores]:
    """The mean over all questions, and over those of each kind."""

    def score(answered: Answered) -> Scores:
        kinds: dict[str, list[float]] = defaultdict(list)
        for question, answer in answered:
            kinds[question.kind].append(right(question, answer))
        every = _mean([value for values in kinds.values() for value in values])
        return {"accuracy": every} | ({k: _mean(v) for k, v in sorted(kinds.items())} if len(kinds) > 1 else {})

    return score


# -- open answers --


def read_vqav2(path: Path, annotations: Path | None) -> list[Question]:
    """v2_OpenEnded_mscoco_*_questions.json with v2_mscoco_*_annotations.json; images are COCO_val2014_000000000042.jpg."""
    if annotations is None:
        raise InputError("VQAv2 keeps its answers in a file of their own: name it with --annotations")
    known = {a["question_id"]: a for a in _json(annotations, "VQA annotations")["annotations"]}
    data = _json(path, "VQA questions")
    folder = data.get("data_subtype", "val2014")
    questions = []
    for q in data["questions"]:
        truth = known.get(q["question_id"])
        if truth is None:
            raise InputError(f"{annotations}: has no answers to question {q['question_id']} of {path}")
        image = f"COCO_{folder}_{int(q['image_id']):012d}.jpg"
        people = [a["answer"] for a in truth["answers"]]
        kind = str(truth.get("answer_type", "all"))
        questions.append(Question(str(q["question_id"]), [image], [], _ask(q["question"] + SHORT), people, kind))
    return questions


def read_textvqa(path: Path, annotations: Path | None) -> list[Question]:
    """TextVQA_0.5.1_val.json; images are IMAGE_ID.jpg."""
    rows = _json(path, "TextVQA's JSON")["data"]
    return [
        Question(str(q["question_id"]), [f"{q['image_id']}.jpg"], [], _ask(q["question"] + SHORT), q["answers"], "all")
        for q in rows
    ]


def vqa_right(question: Question, answer: str) -> float:
    """VQA accuracy of one answer."""
    return vqa_accuracy(answer, question.truth)


def read_gqa(path: Path, annotations: Path | None) -> list[Question]:
    """testdev_balanced_questions.json; images are IMAGE_ID.jpg."""
    return [
        Question(
            identity,
            [f"{q['imageId']}.jpg"],
            [],
            _ask(q["question"] + SHORT),
            q["answer"],
            str(q.get("types", {}).get("structural", "all")),
        )
        for identity, q in _json(path, "GQA's questions").items()
    ]


def exactly_right(question: Question, answer: str) -> float:
    """Exact match, without case, articles and punctuation."""
    return float(is_correct(answer, str(question.truth)))


# -- yes or no --


def read_pope(path: Path, annotations: Path | None) -> list[Question]:
    """coco_pope_{random,popular,adversarial}.json: JSON lines."""
    return [
        Question(str(q["question_id"]), [q["image"]], [], _ask(q["text"] + SHORT), q["label"], "all")
        for q in _json_lines(path, "POPE's JSON lines")
    ]


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: no if its first sentence has "no" or "not", else yes."""
    first = answer.split(".")[0].replace(",", "").lower().split()
    return not ("no" in first or "not" in first)


def pope_right(question: Question, answer: str) -> float:
    """Whether yes or no was said rightly."""
    return float(says_yes(answer) == (str(question.truth).lower() == "yes"))


def pope_score(answered: Answered) -> Scores:
    """F1 of "yes", accuracy, precision, recall, and the share of yes."""
    pairs = [(says_yes(answer), str(question.truth).lower() == "yes") for question, answer in answered]
    both = sum(said and true for said, true in pairs)
    said, true = sum(s for s, _ in pairs), sum(t for _, t in pairs)
    precision, recall = both / max(said, 1), both / max(true, 1)
    return {
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "accuracy": _mean([float(s == t) for s, t in pairs]),
        "precision": precision,
        "recall": recall,
        "yes": said / max(len(pairs), 1),
    }


def read_mme(path: Path, annotations: Path | None) -> list[Question]:
    """The benchmark's folder: a folder a task, with TASK/IMAGE.txt (two lines "question<TAB>Yes|No") and its image beside, or under
    images/ and questions_answers_YN/. Image paths start from the benchmark's folder."""
    questions = []
    for text in sorted(path.glob("*/**/*.txt")):
        task = text.relative_to(path).parts[0]
        places = (text.parent, text.parent.parent / "images")
        found = [p for place in places for p in sorted(place.glob(f"{text.stem}.*")) if p.suffix != ".txt"]
        if not found:
            raise InputError(f"{text}: no image of the same name beside it")
        image = str(found[0].relative_to(path))
        for k, line in enumerate(text.read_text(encoding="utf-8").splitlines()):
            asked, tab, truth = line.rpartition("\t")
            if not tab:
                raise InputError(f'{text}, line {k + 1}: expected "question<TAB>Yes" or "question<TAB>No"')
            questions.append(Question(f"{task}/{text.stem}#{k}", [image], [], _ask(asked), truth.strip(), task))
    return questions


def mme_right(question: Question, answer: str) -> float:
    """Whether the answer begins with the right one of yes and no."""
    return float(normalize(answer).split()[:1] == [str(question.truth).lower()])


def mme_score(answered: Answered) -> Scores:
    """Points as in the paper: of each task 100 times accuracy plus 100 times accuracy+ (both questions of an image right)."""
    tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question, answer in answered:
        tasks[question.kind][question.id.rpartition("#")[0]].append(mme_right(question, answer))
    points = {
        task: 100 * _mean([x for pair in pairs.values() for x in pair]) + 100 * _mean([min(p) for p in pairs.values()])
        for task, pairs in sorted(tasks.items())
    }
    return {"points": sum(points.values()), **points}


# -- choices --


def _choices(question: str, hint: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*([hint] if hint else []), question, *lines]) + LETTER


def read_scienceqa(path: Path, annotations: Path | None) -> list[Question]:
    """problems.json: the test questions that have an image (ScienceQA-IMG); images are test/ID/image.png."""
    questions = []
    for identity, q in _json(path, "ScienceQA's problems.json").items():
        if q.get("split", "test") == "test" and q.get("image"):
            text = _choices(q["question"], q.get("hint", ""), q["choices"])
            image = f"test/{identity}/{q['image']}"
            kind = str(q.get("subject", "all"))
            questions.append(Question(identity, [image], [], _ask(text), LETTERS[q["answer"]], kind))
    return questions


def read_mmbench(path: Path, annotations: Path | None) -> list[Question]:
    """mmbench_dev_*.tsv with its images in base64; each question is asked once for each rotation of its choices (CircularEval)."""
    csv.field_size_limit(sys.maxsize)
    questions = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            options = [row[c] for c in "ABCD" if row.get(c) and row[c] != "nan"]
            if row.get("answer") not in tuple(LETTERS[: len(options)]):
                raise InputError(
                    f"{path}, question {row.get('index')}: no answer among its choices (is it the test split?)"
                )
            hint = "" if row.get("hint") in (None, "nan") else row["hint"]
            place = LETTERS.index(row["answer"])
            for turn in range(len(options)):
                turned = options[turn:] + options[:turn]
                truth = LETTERS[(place - turn) % len(options)]
                image = f"{DATA_URI}image;base64,{row['image']}"
                text = _ask(_choices(row["question"], hint, turned))
                questions.append(
                    Question(f"{row['index']}#{turn}", [image], [], text, truth, row.get("category") or "all")
                )
    return questions


_CHOICE = re.compile(r"^\W*(?:the )?(?:correct )?(?:answer(?: is)?\W*)?\(?([A-H])\b", re.IGNORECASE)


def letter_right(question: Question, answer: str) -> float:
    """Whether the answer names the right choice's letter."""
    found = _CHOICE.match(answer.strip())
    return float(found is not None and found.group(1).upper() == question.truth)


def mmbench_score(answered: Answered) -> Scores:
    """CircularEval: a question is right if it is so in every rotation; over all, and by category."""
    rotations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for question, answer in answered:
        rotations[question.id.rpartition("#")[0], question.kind].append(letter_right(question, answer))
    kinds: dict[str, list[float]] = defaultdict(list)
    for (_, kind), values in rotations.items():
        kinds[kind].append(min(values))
    vanilla = _mean([values[0] for values in rotations.values()])
    every = _mean([x for values in kinds.values() for x in values])
    return {
        "accuracy (circular)": every,
        "accuracy (asked once)": vanilla,
        **{k: _mean(v) for k, v in sorted(kinds.items())},
    }


# -- boxes --


def read_refcoco(path: Path, annotations: Path | None) -> list[Question]:
    """JSON lines {"image", "sent", "bbox": [x, y, width, height] in pixels, "width", "height"}, as its users publish the refs."""
    questions = []
    for k, q in enumerate(_json_lines(path, "RefCOCO as JSON lines")):
        x, y, w, h = q["bbox"]
        box = [x / q["width"], y / q["height"], (x + w) / q["width"], (y + h) / q["height"]]
        text = f"Please provide the bounding box coordinate of the region this sentence describes: {q['sent']}"
        questions.append(Question(str(q.get("id", k)), [q["image"]], [], _ask(text), box, "all"))
    return questions


def intersection_over_union(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two boxes [left, top, right, bottom]."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    inner = max(width, 0.0) * max(height, 0.0)
    areas = sum(max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0) for b in (one, other))
    return inner / (areas - inner) if areas > inner else 0.0


def box_right(question: Question, answer: str) -> float:
    """Whether the first four numbers of the answer, shares of the image's sides, are a box with an IoU of at least 0.5."""
    numbers = [float(x) for x in re.findall(r"\d*\.?\d+", answer)[:4]]
    return float(len(numbers) == 4 and intersection_over_union(numbers, question.truth) >= 0.5)


BENCHMARKS = {
    "vqav2": Benchmark(read_vqav2, _by_kind(vqa_right), vqa_right, "VQA accuracy, arXiv:1612.00837"),
    "textvqa": Benchmark(read_textvqa, _by_kind(vqa_right), vqa_right, "VQA accuracy, arXiv:1904.08920"),
    "gqa": Benchmark(read_gqa, _by_kind(exactly_right), exactly_right, "accuracy, arXiv:1902.09506"),
    "pope": Benchmark(read_pope, pope_score, pope_right, "F1 of yes, arXiv:2305.10355"),
    "mme": Benchmark(read_mme, mme_score, mme_right, "accuracy and accuracy+, arXiv:2306.13394"),
    "scienceqa": Benchmark(read_scienceqa, _by_kind(letter_right), letter_right, "accuracy, arXiv:2209.09513"),
    "mmbench": Benchmark(read_mmbench, mmbench_score, letter_right, "CircularEval, arXiv:2307.06281"),
    "refcoco": Benchmark(read_refcoco, _by_kind(box_right), box_right, "accuracy at IoU 0.5, arXiv:1608.00272"),
}


def read_benchmark(name: str, path: Path, annotations: Path | None, limit: int | None) -> list[Question]:
    """The questions of a benchmark.

    Raises:
        InputError: no such file, or not in its authors' format.
    """
    if not path.exists():
        raise InputError(f"--data {path}: no such file or folder")
    try:
        questions = BENCHMARKS[name].read(path, annotations)
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OSError, csv.Error) as error:
        raise InputError(f"{path}: not in the format of {name} as its authors publish it: {error!r}") from error
    if not questions:
        raise InputError(f"{path}: holds no question of {name}")
    return questions[:limit]
