"""Benchmarks in their authors' formats; figures worked out by hand."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_tune.errors import InputError
from llava_tune.evaluate.benchmarks import BENCHMARKS, intersection_over_union, read_benchmark
from llava_tune.evaluate.metrics import Question
from llava_tune.evaluate.vqa import normalize_vqa, vqa_accuracy


@pytest.mark.parametrize(
    ("said", "compared"),
    [  # https://visualqa.org/evaluation.html, rule by rule
        ("Red", "red"),
        ("the red  bus", "red bus"),
        ("A dog and an apple", "dog and apple"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("can't", "can't"),
        ("100,978", "100978"),
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("yes!", "yes"),
        ("well-known", "well known"),
        ("10:30", "10:30"),
    ],
)
def test_vqa_normalisation_is_the_official_one(said: str, compared: str) -> None:
    assert normalize_vqa(said) == compared


def test_vqa_accuracy_leaves_each_person_out() -> None:
    people = ["red"] * 2 + ["blue"] * 8
    # Left out a "red" (twice): one other says red, 1/3. Left out a "blue" (8 times): two say red, 2/3.
    assert vqa_accuracy("Red.", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("blue", people) == 1
    assert vqa_accuracy("green", people) == 0
    # Three of ten: left out one of them, 2/3; else 1.
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)


def score(name: str, questions: list[Question], answers: list[str]) -> dict[str, float]:
    assert len(questions) == len(answers), [q.id for q in questions]
    return BENCHMARKS[name].score(list(zip(questions, answers, strict=True)))


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_vqav2(tmp_path: Path) -> None:
    asked = [
        {"image_id": 42, "question": "What color?", "question_id": 42000},
        {"image_id": 7, "question": "How many?", "question_id": 7001},
    ]
    people = [["red"] * 10, ["2"] * 3 + ["3"] * 7]
    truths = [
        {
            "question_id": q["question_id"],
            "answer_type": kind,
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given)],
        }
        for q, given, kind in zip(asked, people, ["other", "number"], strict=True)
    ]
    path = written(tmp_path / "q.json", {"data_subtype": "val2014", "questions": asked})
    annotations = written(tmp_path / "a.json", {"annotations": truths})
    questions = read_benchmark("vqav2", path, annotations, None)
    assert questions[0].images == ["COCO_val2014_000000000042.jpg"]
    assert questions[0].question == "<image>\nWhat color?\nAnswer the question using a single word or phrase."
    found = score("vqav2", questions, ["The red", "two"])
    assert found == pytest.approx({"accuracy": 0.95, "number": 0.9, "other": 1.0})
    with pytest.raises(InputError, match="--annotations"):
        read_benchmark("vqav2", path, None, None)


def test_textvqa_and_gqa(tmp_path: Path) -> None:
    rows = [{"question": "brand?", "image_id": "0a1", "question_id": 34602, "answers": ["nokia"] * 9 + ["toshiba"]}]
    text = read_benchmark("textvqa", written(tmp_path / "t.json", {"data": rows}), None, None)
    assert text[0].images == ["0a1.jpg"] and score("textvqa", text, ["Nokia"]) == {"accuracy": 1.0}
    gqa = {
        "201": {"question": "Is it?", "imageId": "n16", "answer": "yes", "types": {"structural": "verify"}},
        "202": {"question": "Who?", "imageId": "n17", "answer": "man", "types": {"structural": "query"}},
    }
    questions = read_benchmark("gqa", written(tmp_path / "g.json", gqa), None, None)
    assert score("gqa", questions, ["Yes", "a woman"]) == {"accuracy": 0.5, "query": 0.0, "verify": 1.0}


def test_pope(tmp_path: Path) -> None:
    rows = [{"question_id": k, "image": "i.jpg", "text": "Is there a dog?", "label": t} for k, t in enumerate("yyynn")]
    rows = [{**row, "label": {"y": "yes", "n": "no"}[row["label"]]} for row in rows]  # type: ignore[index]
    path = written(tmp_path / "p.json", "\n".join(map(json.dumps, rows)))
    found = score(
        "pope", read_benchmark("pope", path, None, None), ["Yes", "yes, a dog", "No.", "Yes.", "There is not"]
    )
    # 3 said yes, 2 of them rightly; 3 are yes: precision 2/3, recall 2/3.
    assert found == pytest.approx({"f1": 2 / 3, "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "yes": 3 / 5})


def test_mme(tmp_path: Path) -> None:
    for task, name in (("color", "1"), ("color", "2"), ("OCR", "3")):
        written(tmp_path / task / f"{name}.txt", "Is it red? Please answer yes or no.\tYes\nIs it blue?\tNo\n")
        (tmp_path / task / f"{name}.jpg").write_bytes(b"")
    questions = read_benchmark("mme", tmp_path, None, None)
    assert [q.images[0] for q in questions[:3]] == ["OCR/3.jpg", "OCR/3.jpg", "color/1.jpg"]
    found = score("mme", questions, ["Yes", "no", "Yes.", "Yes.", "yes", "No, it is not"])
    # OCR: 100 + 100. color: 3 of 4 right, 1 of 2 images with both: 75 + 50.
    assert found == {"points": 325.0, "OCR": 200.0, "color": 125.0}


def test_scienceqa(tmp_path: Path) -> None:
    problems = {
        "1": {"question": "Which?", "choices": ["one", "two"], "answer": 1, "hint": "Look.", "image": "image.png", "split": "test"},
        "2": {"question": "Text?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "split": "test"},
        "3": {"question": "Train?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": "image.png", "split": "train"},
        "4": {"question": "Who?", "choices": ["x", "y", "z"], "answer": 2, "hint": "", "image": "image.png", "split": "test"},
    }  # fmt: skip
    questions = read_benchmark("scienceqa", written(tmp_path / "problems.json", problems), None, None)
    assert [q.id for q in questions] == ["1", "4"] and questions[0].images == ["test/1/image.png"]
    assert questions[0].question.startswith("<image>\nLook.\nWhich?\nA. one\nB. two\nAnswer with the option's letter")
    assert score("scienceqa", questions, ["B. two", "The answer is (A)"]) == {"accuracy": 0.5}


def test_mmbench_is_circular(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    image = base64.b64encode(buffer.getvalue()).decode()
    lines = [
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage",
        f"0\tWhat?\tnan\tcat\tdog\tcow\tnan\tB\tanimals\t{image}",
        f"1\tWhere?\tSee.\there\tthere\tnan\tnan\tA\tplaces\t{image}",
    ]
    questions = read_benchmark("mmbench", written(tmp_path / "m.tsv", "\n".join(lines)), None, None)
    assert [(q.id, q.truth) for q in questions] == [
        ("0#0", "B"),
        ("0#1", "A"),
        ("0#2", "C"),
        ("1#0", "A"),
        ("1#1", "B"),
    ]
    assert "A. dog\nB. cow\nC. cat" in questions[1].question
    right = score("mmbench", questions, ["B", "A", "C", "A", "A"])
    assert right == {"accuracy (circular)": 0.5, "accuracy (asked once)": 1.0, "animals": 1.0, "places": 0.0}


def test_refcoco(tmp_path: Path) -> None:
    assert intersection_over_union([0, 0, 2, 2], [1, 0, 3, 2]) == pytest.approx(1 / 3)
    rows = [{"image": "a.jpg", "sent": "left man", "bbox": [10, 20, 30, 40], "width": 100, "height": 100}] * 2
    path = written(tmp_path / "r.jsonl", "\n".join(map(json.dumps, rows)))
    questions = read_benchmark("refcoco", path, None, None)
    assert questions[0].truth == [0.1, 0.2, 0.4, 0.6]
    assert score("refcoco", questions, ["[0.10, 0.20, 0.40, 0.55]", "no box"]) == {"accuracy": 0.5}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_another_file_is_refused(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", [{"id": 1}])
    with pytest.raises(InputError):
        read_benchmark(name, path, path, None)
    with pytest.raises(InputError, match="no such file"):
        read_benchmark(name, tmp_path / "none", None, None)
