"""The gate of a GGUF export: llama.cpp opens the files, and must choose the tokens that we choose, with their probabilities."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_tune.errors import RunFailed
from llava_tune.evaluate.answer import Answerer
from llava_tune.export.gate import GREEDY, Conversation, laid_out
from llava_tune.model.llava import Llava

TOLERANCE = {"fp32": 0.01, "fp16": 0.05, "q8_0": 0.5}
"""Of a log-probability. llama.cpp computes GELU from a table in f16, and rounds activations to the weights' precision."""


@dataclass(frozen=True)
class Report:
    """What the gate found.

    Attributes:
        questions: how many were asked, with images and without.
        prompts_equal: both count the same tokens in every prompt.
        logprobs: largest difference of a chosen token's log-probability.
        greedy: of llama.cpp's tokens (64 a question at most), how many are our choice too, and of how many.
        class_token: where this build of llama.cpp puts CLIP's class token: "first", as CLIP does; or "last", which drops the image's
            first patch and shifts the positions of the others (llama.cpp issue 25814), and was compared with our model computing the
            same; None: the tower has none.
        build: of llama.cpp.
    """

    questions: int
    prompts_equal: bool
    logprobs: float
    greedy: tuple[int, int]
    class_token: str | None
    build: str

    def failures(self, dtype: str) -> list[str]:
        """What is not as it must be; empty if the gate is passed."""
        found = []
        if not self.prompts_equal:
            found.append("the tokenizer or chat template gives prompts of another length")
        if not self.greedy[1]:
            found.append("llama.cpp gave no token to compare")
        if not self.logprobs <= TOLERANCE[dtype]:
            found.append(f"log-probabilities differ by {self.logprobs:.2g}, more than {TOLERANCE[dtype]} ({dtype})")
        return found


def write_square(image: Path, size: int, folder: Path) -> Path:
    """The picture at the tower's size, so that llama.cpp's own resizing plays no part."""
    path = folder / f"{image.stem}_{size}.png"
    with Image.open(image) as opened:
        opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(path)
    return path


def ask_llama_cpp(folder: Path, asked: list[Conversation], beside: Path, context: int) -> dict[str, Any]:
    """What llama.cpp makes of the conversations, in a process of its own: {"answers": [{"text", "ids", "logprobs", "prompt_tokens"}],
    "build"}.

    Raises:
        RunFailed: it can't open the files.
    """
    messages = []
    for conversation in asked:
        said: list[dict[str, Any]] = []
        for question, answer, images in conversation:
            parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_uri(p)}} for p in images]
            said.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            if answer:
                said.append({"role": "assistant", "content": answer})
        messages.append(said)
    questions, out = beside / "questions.json", beside / "found.json"
    questions.write_text(json.dumps({"questions": messages, "max_new_tokens": GREEDY, "context": context}))
    program = Path(__file__).with_name("opened_llama_cpp.py")
    done = subprocess.run(
        [sys.executable, program, folder.resolve(), questions, out], capture_output=True, text=True, cwd=beside
    )
    if done.returncode or not out.is_file():
        raise RunFailed(f"llama.cpp can't open the export {folder}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def compare(answerer: Answerer, asked: list[Conversation], found: dict[str, Any]) -> Report:
    """What llama.cpp's answers differ by from our model, in fp32; of the two places of a class token, the one that fits."""
    reports = [_compare(answerer, asked, found, None)]
    vision = answerer.llava.vision
    if vision is not None and not vision.is_timm:
        reports = [_compare(answerer, asked, found, "first")]
        with class_token_last(answerer.llava):
            reports.append(_compare(answerer, asked, found, "last"))
    return min(reports, key=lambda report: report.logprobs)


def _compare(answerer: Answerer, asked: list[Conversation], found: dict[str, Any], place: str | None) -> Report:
    equal, worst, agree, total = True, 0.0, 0, 0
    for conversation, answer in zip(asked, found["answers"], strict=True):
        length, logprobs = _logprobs(answerer, conversation, answer["ids"])
        equal &= length == answer["prompt_tokens"]
        for row, token, theirs in zip(logprobs, answer["ids"], answer["logprobs"], strict=True):
            difference = abs(float(row[token]) - theirs)
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
            agree += int(row.argmax()) == token
            total += 1
    return Report(len(asked), equal, worst, (agree, total), place, f"xllamacpp {found['version']}")


def _logprobs(answerer: Answerer, conversation: Conversation, new: list[int]) -> tuple[int, Tensor]:
    """(tokens of the prompt, float32 [new, vocabulary] log-probabilities at each of the new tokens)."""
    llava = answerer.llava
    _, ids, pixels = laid_out(answerer, conversation)
    with torch.inference_mode():
        device = next(llava.parameters()).device
        whole = torch.from_numpy(np.concatenate([ids, np.array(new, ids.dtype)]))[None].to(device)
        embeddings = llava.embed(whole, None if pixels is None else pixels.to(device))
        logits = llava.llm(inputs_embeds=embeddings, use_cache=False).logits[0].float().cpu()
    return len(ids), logits[len(ids) - 1 : len(ids) - 1 + len(new)].log_softmax(-1)


@contextmanager
def class_token_last(llava: Llava) -> Iterator[None]:
    """Compute as the builds of llama.cpp do that put the class token last: each patch takes its left neighbour's position, the first
    patch is dropped and the class token is taken for the last one."""
    vision: Any = llava.vision
    positions = vision.visual.positional_embedding
    own, forward = positions.data, vision.forward

    def shifted(pixel_values: Tensor) -> Tensor:
        output = vision.visual.forward_intermediates(
            pixel_values,
            indices=[-1],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        patches, extra = output["image_intermediates"][0], output["image_intermediates_prefix"][0]
        return torch.cat([patches[:, 1:], extra[:, :1]], dim=1)

    positions.data = own.roll(1, dims=0)  # the class token is first here: it takes the last position, patch 0 the first
    vision.forward = shifted
    try:
        yield
    finally:
        positions.data = own
        vision.forward = forward


def context(answerer: Answerer, asked: list[Conversation]) -> int:
    """Tokens that the longest conversation and its answer take, and some."""
    patches = answerer.llava.vision.tokens if answerer.llava.vision is not None else 1
    images = max(sum(len(paths) for _, _, paths in conversation) for conversation in asked)
    return 512 + images * patches


def sentence(report: Report) -> str:
    """The report as a person reads it."""
    said = (
        f"opened by llama.cpp ({report.build}) in a process of its own, {report.questions} questions: prompts of the same length, "
        f"log-probabilities differ by at most {report.logprobs:.1e}, {report.greedy[0]} of {report.greedy[1]} greedy tokens are ours too"
    )
    if report.class_token == "last":
        said += (
            "\nwarning: this build of llama.cpp puts CLIP's class token last (llama.cpp issue 25814): it drops each image's first patch and "
            "shifts the others' positions. It was compared with our model computing the same; its answers on images are not quite those that "
            "the model was trained to give. Builds from before May 2025, or with that issue mended, have it right"
        )
    return said


def write_report(folder: Path, report: Report, dtype: str) -> None:
    """gate.json in the export."""
    facts = asdict(report) | {"tolerance": TOLERANCE[dtype], "weights": dtype, "torch": torch.__version__}
    (folder / "gate.json").write_text(json.dumps(facts, indent=1))
