"""The first held-out questions asked of the exports in other programs: transformers serve with an OpenAI client, llama.cpp, lmms-eval.

python benchmarks/easy_vqa/elsewhere.py CHECKPOINT DATA.json IMAGE_FOLDER WORK [--questions 50]

Exports the checkpoint to WORK (hf and gguf, in fp32) if it isn't there, and compares every answer with `evaluate`'s, letter by letter; of a
llama.cpp that puts CLIP's class token last (its issue 25814), also with our model computing the same. lmms-eval is left out where it isn't
installed.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from llava_tune.evaluate.answer import Answerer
from llava_tune.evaluate.metrics import Question, is_correct
from llava_tune.evaluate.questions import read_questions
from llava_tune.export.gate_llama_cpp import class_token_last
from llava_tune.export.run import export

NEW = 32
TASK = """dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
task: easy_vqa_local
test_split: test
output_type: generate_until
doc_to_visual: !function easy_vqa_utils.visual
doc_to_text: !function easy_vqa_utils.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {new}
  do_sample: false
  temperature: 0
process_results: !function easy_vqa_utils.score
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
UTILS = """import io
from PIL import Image
def visual(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]
def text(doc):
    return doc["question"]
def score(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"].lower())}
"""


def text_of(question: Question) -> str:
    """Without its placeholder."""
    return question.question.replace("<image>\n", "")


def through_openai(folder: Path, asked: list[Question], images: Path) -> list[str]:
    """transformers serve, asked by OpenAI's client with data URIs."""
    import openai

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "llava_tune.cli.main", "serve", str(folder), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    try:
        answers = []
        for question in asked:
            data = base64.b64encode((images / question.images[0]).read_bytes()).decode()
            content: Any = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
                {"type": "text", "text": text_of(question)},
            ]
            said = [{"role": "user", "content": content}]
            for _ in range(90):
                try:
                    found = client.chat.completions.create(model=str(folder), messages=said, max_tokens=NEW)  # type: ignore[arg-type]
                    break
                except openai.APIConnectionError:
                    time.sleep(1)
            answers.append((found.choices[0].message.content or "").strip())
        return answers
    finally:
        server.terminate()
        server.wait(30)


def through_llama_cpp(folder: Path, asked: list[Question], images: Path, work: Path) -> tuple[list[str], str]:
    """llama.cpp on the GGUF files; also its build."""
    messages = []
    for question in asked:
        data = base64.b64encode((images / question.images[0]).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        messages.append([{"role": "user", "content": [image, {"type": "text", "text": text_of(question)}]}])
    questions, out = work / "questions.json", work / "llama_cpp.json"
    questions.write_text(json.dumps({"questions": messages, "max_new_tokens": NEW, "context": 1024}))
    program = Path(export.__code__.co_filename).with_name("opened_llama_cpp.py")
    subprocess.run([sys.executable, program, folder, questions, out], check=True, capture_output=True)
    found = json.loads(out.read_text())
    return [answer["text"].strip() for answer in found["answers"]], f"xllamacpp {found['version']}"


def through_lmms_eval(checkpoint: Path, folder: Path, asked: list[Question], images: Path, work: Path) -> list[str]:
    """lmms-eval on a task of our own, through `llava-tune evaluate --harness`."""
    import pyarrow as pa
    from pyarrow import parquet

    tasks, out = work / "tasks", work / "lmms-eval"
    tasks.mkdir(exist_ok=True)
    rows = [
        {"id": q.id, "image": (images / q.images[0]).read_bytes(), "question": text_of(q), "answer": q.truth}
        for q in asked
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tasks / "test.parquet")
    (tasks / "easy_vqa_local.yaml").write_text(TASK.format(data=tasks / "test.parquet", new=NEW))
    (tasks / "easy_vqa_utils.py").write_text(UTILS)
    command = [
        sys.executable,
        "-m",
        "llava_tune.cli.main",
        "evaluate",
        str(folder),
        "--harness",
        "lmms-eval",
        "--tasks",
        "easy_vqa_local",
    ]
    command += ["--output", str(out), f"--harness-args=--include_path {tasks}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lmms-eval failed: {done.stderr[-3000:]}")
    samples = max(out.rglob("*samples_easy_vqa_local.jsonl"), key=lambda p: p.stat().st_mtime)
    found = {}
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        answer = row["filtered_resps"]
        found[row["doc_id"]] = (answer[0] if isinstance(answer, list) else answer).strip()
    return [found[k] for k in range(len(asked))]


def ours(answerer: Answerer, asked: list[Question], images: Path) -> list[str]:
    """Our own answers, one question at a time."""
    found = []
    for question in asked:
        pixels = [answerer.transform.load(images, image) for image in question.images]
        found += answerer.answer([answerer.prompt([], question.question)], pixels, NEW)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "data", "images", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--questions", type=int, default=50)
    given = parser.parse_args()
    asked = read_questions(given.data, given.questions)
    given.work.mkdir(parents=True, exist_ok=True)
    hf, gguf = given.work.resolve() / "hf", given.work.resolve() / "gguf"
    for folder, kind in ((hf, "hf"), (gguf, "gguf")):
        if not folder.is_dir():
            print(export(given.checkpoint, folder, format=kind, dtype="fp32"))
    answerer = Answerer(given.checkpoint, dtype=torch.float32)
    plain = ours(answerer, asked, given.images)
    with class_token_last(answerer.llava) if not answerer.llava.vision.is_timm else nullcontext():  # type: ignore[union-attr]
        shifted = ours(answerer, asked, given.images)
    right = sum(is_correct(a, str(q.truth)) for a, q in zip(plain, asked, strict=True))
    print(f"{len(asked)} questions, {right} right by llava-tune")
    print("| program | same answers as ours | same as ours with the class token last | right |")
    print("|-|-:|-:|-:|")

    def row(name: str, answers: list[str]) -> None:
        same = [sum(a == b for a, b in zip(answers, other, strict=True)) for other in (plain, shifted)]
        found = sum(is_correct(a, str(q.truth)) for a, q in zip(answers, asked, strict=True))
        print(f"| {name} | {same[0]} | {same[1]} | {found} |", flush=True)

    row("transformers serve, OpenAI client", through_openai(hf, asked, given.images))
    answers, build = through_llama_cpp(gguf, asked, given.images, given.work)
    row(f"llama.cpp ({build}), fp32", answers)
    if importlib.util.find_spec("lmms_eval") is not None:
        row("lmms-eval", through_lmms_eval(given.checkpoint, hf, asked, given.images, given.work))


if __name__ == "__main__":
    main()
