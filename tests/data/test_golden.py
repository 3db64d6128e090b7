"""Golden ids, through the command that users run, and an independent layout in XTuner's way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import sentencepiece

from tests.conftest import Finished

CONFIG = """from llava_tune.config import *
run = Run(
    model=Model(llm=LanguageModel(name={tokenizer!r}), vision=VisionTower(name="ViT-L-14-336-quickgelu")),
    dataset=Dataset(data_path={data!r}, image_folder={folder!r}, max_length=2048, max_bad_share=0.5),
    optimizer=Optimizer(learning_rate=1e-3),
    training=Training(global_batch_size=8),
)
"""


@pytest.fixture
def prepared(
    tmp_path: Path, internlm2_tokenizer: Path, cli: Callable[..., Finished]
) -> Callable[..., datasets.Dataset]:
    def run(records: list[dict[str, Any]], *more: object, name: str = "data.json") -> datasets.Dataset:
        data = tmp_path / name
        lines = "".join(json.dumps(r) + "\n" for r in records)
        data.write_text(lines if name.endswith("jsonl") else json.dumps(records))
        config = tmp_path / "c.py"
        config.write_text(CONFIG.format(tokenizer=str(internlm2_tokenizer), data=str(data), folder=str(tmp_path)))
        store = tmp_path / f"store-{name}"
        done = cli("prepare", config, "--save-folder", store, *more)
        assert done.code == 0, done.err
        return datasets.load_from_disk(str(store))

    return run


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_golden_ids(shared: Path, prepared: Callable[..., datasets.Dataset], name: str) -> None:
    golden = json.loads((shared / "golden_ids/internlm2_llava_golden.json").read_text())
    records = [
        {"id": c["name"], "conversations": c["conversations"], **({"image": "x.jpg"} if c["image"] else {})}
        for c in golden["cases"]
    ]
    rows = prepared(records, name=name)
    assert len(rows) == len(golden["cases"]) > 0
    for row, case in zip(rows, golden["cases"], strict=True):
        assert row["input_ids"] == case["input_ids"]
        assert row["labels"] == case["labels"]
        assert row["image"] == ["x.jpg"]
        assert row["length"] == len(case["input_ids"]) - 1 + 576


class XTunerLayout:
    """XTuner 0.1.23's layout of internlm2_chat with sentencepiece, from its description in the shared documents."""

    start, end, bos = 92543, 92542, 1

    def __init__(self, model: Path) -> None:
        self.encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode

    def __call__(self, rounds: list[tuple[str, str]], system: str = "") -> tuple[list[int], list[int]]:
        ids, labels = [self.bos], [-100]
        for k, (question, answer) in enumerate(rounds):
            said: list[int] = []
            if system and k == 0:
                said += [self.start, *self.encode(f"system\n{system}"), self.end, *self.encode("\n")]
            if "<image>" in question:
                rest = question.replace("<image>", "").strip()
                said += [self.start, *self.encode("user\n"), -200, *self.encode("\n" + rest)]
            else:
                said += [self.start, *self.encode("user\n" + question)]
            said += [self.end, *self.encode("\n"), self.start, *self.encode("assistant\n")]
            learnt = [*self.encode(answer), self.end]
            newline = self.encode("\n")
            ids += said + learnt + newline
            labels += [-100] * len(said) + learnt + [-100] * len(newline)
        return ids, labels


def test_layout_of_multi_turn_system_and_text_only(
    internlm2_tokenizer: Path, prepared: Callable[..., datasets.Dataset]
) -> None:
    layout = XTunerLayout(internlm2_tokenizer / "tokenizer.model")
    cases: list[tuple[list[tuple[str, str]], str]] = [
        ([("What is it?\n<image>", "A cat."), ("And where?", "On a mat.\nAsleep.")], ""),
        ([("Hello", "Hi there"), ("你好", "你好！")], "You are  helpful."),
        ([("\n leading and trailing \n", " spaces ")], ""),
        ([("plain", "")], ""),
        ([("say <|im_end|> please", "no</s><s>[UNUSED_TOKEN_1]")], ""),
    ]
    records = []
    for k, (rounds, system) in enumerate(cases):
        messages = [{"from": "system", "value": system}] if system else []
        for question, answer in rounds:
            messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        images = {"image": "a.jpg"} if any("<image>" in q for q, _ in rounds) else {}
        records.append({"id": k, **images, "conversations": messages})
    rows = prepared(records)
    assert len(rows) == len(cases)
    for row, (rounds, system) in zip(rows, cases, strict=True):
        assert (row["input_ids"], row["labels"]) == layout(rounds, system)


def test_several_images_stay_where_they_are_written(
    prepared: Callable[..., datasets.Dataset], internlm2_tokenizer: Path
) -> None:
    encode = sentencepiece.SentencePieceProcessor(model_file=str(internlm2_tokenizer / "tokenizer.model")).encode
    question = "First <image> then <image>?"
    record = {
        "id": "m",
        "image": ["a.jpg", "b.jpg"],
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "ok"}],
    }
    row = prepared([record])[0]
    begin = [1, 92543, *encode("user\nFirst "), -200, *encode(" then "), -200, *encode("?"), 92542]
    assert row["input_ids"][: len(begin)] == begin
    assert row["image"] == ["a.jpg", "b.jpg"]
    assert row["length"] == len(row["input_ids"]) + 2 * 575


def test_image_position_as_written(prepared: Callable[..., datasets.Dataset], internlm2_tokenizer: Path) -> None:
    encode = sentencepiece.SentencePieceProcessor(model_file=str(internlm2_tokenizer / "tokenizer.model")).encode
    record = {
        "id": 1,
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "Look:\n<image>"}, {"from": "gpt", "value": "ok"}],
    }
    row = prepared([record], "--dataset.image-position", "as_written")[0]
    begin = [1, 92543, *encode("user\nLook:\n"), -200, 92542]
    assert row["input_ids"][: len(begin)] == begin
