"""Scores against hand counts, and the commands on a trained checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_tune.errors import InputError
from llava_tune.evaluate.metrics import Question, accuracy, is_correct, question_alone_accuracy
from llava_tune.evaluate.questions import read_questions, swap_images
from tests.conftest import Finished, Small, wrong_input


def question(truth: str, text: str = "q", kind: str = "k", image: str = "a") -> Question:
    return Question("i", [image], [], text, truth, kind)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("Red.", "red", True),
        ("the  Red", "red", True),
        ("A cat", "cat", True),
        ("redd", "red", False),
        ("", "no", False),
    ],
)
def test_exact_match_after_normalisation(answer: str, truth: str, right: bool) -> None:
    assert is_correct(answer, truth) is right


def test_accuracy_and_the_question_only_baseline_by_hand() -> None:
    questions = [
        question("yes"),
        question("yes"),
        question("no"),
        question("red", "color?", "c"),
        question("blue", "color?", "c"),
    ]
    assert accuracy(["yes", "no", "no", "red", "red"], questions) == {"k": (2, 3), "all": (3, 5), "c": (1, 2)}
    assert question_alone_accuracy(questions) == 3 / 5


def test_swapping_gives_every_question_another_image() -> None:
    questions = [question("x", image=name) for name in "aabbccdd"]
    swapped = swap_images(questions, 0)
    assert all(a.images != b.images for a, b in zip(questions, swapped, strict=True))
    assert [q.images for q in swap_images(questions, 0)] == [q.images for q in swapped]
    assert sorted(q.images[0] for q in swapped) == list("aabbccdd")


def test_each_round_is_a_question_asked_alone(tmp_path: Path) -> None:
    record = {
        "id": "r",
        "image": "x.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat color is it?"},
            {"from": "gpt", "value": "red"},
            {"from": "human", "value": "Is it red?"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    (tmp_path / "q.json").write_text(json.dumps([record]))
    first, second = read_questions(tmp_path / "q.json")
    assert (second.id, second.question, second.rounds, second.kind) == ("r#1", "<image>\nIs it red?", [], "is")
    assert first.truth == "red"
    (tmp_path / "q.json").write_text('[{"id": 1, "conversations": []},\n{"id": 2}]')
    with pytest.raises(InputError, match="line 1: 'conversations'"):
        read_questions(tmp_path / "q.json")


@pytest.fixture(scope="module")
def checkpoint(small: Small, cli: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("run") / "r"
    done = cli("pretrain", small.config, "--work-dir", work_dir, "--training.max-steps", "3")
    assert done.code == 0, done.err
    return work_dir / "checkpoint-3"


def test_evaluate_writes_every_answer_and_prints_the_baselines(
    small: Small, checkpoint: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    test = small.folder / "data/test.json"
    arguments = ["evaluate", checkpoint, "--data", test, "--image-folder", small.images, "--max-new-tokens", "4"]
    done = cli(*arguments, "--output", tmp_path / "a.jsonl", "--swap-images", "--batch-size", "5")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == [r["id"] for r in json.loads(test.read_text())]
    assert "best answer by the question alone" in done.out
    assert "with each image swapped for another" in done.out
    one_by_one = cli(*arguments, "--output", tmp_path / "b.jsonl", "--batch-size", "1")
    assert one_by_one.code == 0
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()


def test_a_checkpoint_opens_without_the_files_that_it_was_made_from(
    small: Small, checkpoint: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(checkpoint, tmp_path / "moved")
    hidden = small.folder.with_name("hidden")
    images = tmp_path / "images"
    shutil.copytree(small.images, images)
    shutil.copy(small.folder / "data/test.json", tmp_path / "test.json")
    small.folder.rename(hidden)
    try:
        done = cli(
            "evaluate", tmp_path / "moved", "--data", tmp_path / "test.json", "--image-folder", images, "--limit", "2"
        )
    finally:
        hidden.rename(small.folder)
    assert done.code == 0, done.err


def test_chat_answers_and_takes_images(small: Small, checkpoint: Path, tmp_path: Path) -> None:
    first = f"/image {small.images / '00000.png'}\nDescribe the image.\nAnd <image> again?\n"
    lines = f"{first}/image /nowhere.png\n/save {tmp_path / 's'}\n/reset\n/quit\n"
    command = [sys.executable, "-m", "llava_tune.cli.main", "chat", str(checkpoint), "--max-new-tokens", "4"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "goes with your next message" in done.stdout
    assert "/nowhere.png: no such file" in done.stdout
    saved = (tmp_path / "s").read_text()
    assert saved.count("you: ") == 2
    assert saved.startswith(f"image: {small.images / '00000.png'}\nyou: Describe the image.\nmodel: ")


def test_chat_takes_dropped_files_and_system_texts(small: Small, checkpoint: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "a picture.png"
    spaced.write_bytes((small.images / "00000.png").read_bytes())
    lines = (
        f"'{spaced}' {small.images / '00001.png'} What differs?\n/system Be brief.\nAnd now?\n/save {tmp_path / 's'}\n"
    )
    command = [sys.executable, "-m", "llava_tune.cli.main", "chat", str(checkpoint), "--max-new-tokens", "4"]
    done = subprocess.run([*command, "--temperature", "1", "--seed", "3"], input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes with your next message") == 2
    saved = (tmp_path / "s").read_text().splitlines()
    assert saved[:4] == [
        "system: Be brief.",
        f"image: {spaced}",
        f"image: {small.images / '00001.png'}",
        "you: What differs?",
    ]
    again = subprocess.run([*command, "--temperature", "1", "--seed", "3"], input=lines, capture_output=True, text=True)
    assert again.stdout == done.stdout


def test_two_processes_give_the_answers_of_one_and_a_page_of_the_worst(
    small: Small, checkpoint: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    records = json.loads(small.captions.read_text())[:7]
    data = tmp_path / "q.json"
    data.write_text(json.dumps(records))
    arguments = ["evaluate", checkpoint, "--data", data, "--image-folder", small.images, "--max-new-tokens", "6"]
    one = cli(*arguments, "--output", tmp_path / "one.jsonl", "--swap-images", "--batch-size", "2")
    two = cli(
        *arguments,
        "--output",
        tmp_path / "two.jsonl",
        "--swap-images",
        "--batch-size",
        "3",
        env={"NPROC_PER_NODE": "2"},
    )
    assert one.code == two.code == 0, two.err
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert one.out.splitlines()[-4] == two.out.splitlines()[-4] and "swapped for another" in one.out.splitlines()[-3]
    assert two.out.count("accuracy (exact match)") == 1
    assert not list(tmp_path.glob("*.unfinished*"))
    page = (tmp_path / "two-worst.html").read_text()
    assert page.count("<article") == 7 and page.count('src="data:image/jpeg;base64,') == 7
    assert "0 of 7 answers are right" in page and records[0]["conversations"][1]["value"] in page
    drawn = [
        cli(*arguments, "--output", tmp_path / f"{k}.jsonl", "--temperature", "2", "--seed", "5") for k in range(2)
    ]
    assert all(d.code == 0 for d in drawn)
    assert (
        (tmp_path / "0.jsonl").read_text() == (tmp_path / "1.jsonl").read_text() != (tmp_path / "one.jsonl").read_text()
    )


def test_wrong_inputs(small: Small, checkpoint: Path, cli: Callable[..., Finished]) -> None:
    test = small.folder / "data/test.json"
    assert "not a llava-tune checkpoint" in wrong_input(
        cli("evaluate", small.folder, "--data", test, "--image-folder", small.images)
    )
    assert "holds checkpoint-3" in wrong_input(
        cli("evaluate", checkpoint.parent, "--data", test, "--image-folder", small.images)
    )
    assert "--image-folder" in wrong_input(cli("evaluate", checkpoint, "--data", test))
    assert "no such file" in wrong_input(
        cli("evaluate", checkpoint, "--data", "/no.json", "--image-folder", small.images)
    )


def test_kill_9_asks_no_question_twice(
    small: Small, checkpoint: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    records = json.loads(small.captions.read_text())
    rows = [
        {"question_id": k, "image": r["image"], "text": f"Is there a {k}?", "label": "yes"}
        for k, r in enumerate(records)
    ]
    data = tmp_path / "pope.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "answers.jsonl"
    arguments = ["evaluate", checkpoint, "--data", data, "--image-folder", small.images, "--benchmark", "pope"]
    arguments += ["--batch-size", "1", "--max-new-tokens", "40", "--output", output]
    process = subprocess.Popen([sys.executable, "-m", "llava_tune.cli.main", *map(str, arguments)], env={**os.environ})
    journal = tmp_path / "answers.jsonl.unfinished-0"
    deadline = time.monotonic() + 120
    while not journal.is_file() or len(journal.read_text().splitlines()) < 6:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not output.exists()
    kept = journal.read_text().splitlines()
    journal.write_text("\n".join(kept) + '\n{"question": 40, "ans')  # a line that the kill cut off
    # What was answered is taken as it is: a changed answer shows that its question was not asked again.
    changed = [*kept[:1], *(json.dumps({**json.loads(line), "answer": "kept"}) for line in kept[1:])]
    journal.write_text("\n".join(changed) + '\n{"question": 40, "ans')
    done = cli(*arguments)
    assert done.code == 0, done.err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["id"] for a in answers] == [str(k) for k in range(len(rows))]
    assert sum(a["answer"] == "kept" for a in answers) == len(kept) - 1
    assert not journal.exists()
    scores = json.loads((tmp_path / "answers-scores.json").read_text())
    assert scores["questions"] == len(rows) and set(scores["scores"]) == {
        "f1",
        "accuracy",
        "precision",
        "recall",
        "yes",
    }
    assert "f1" in done.out
