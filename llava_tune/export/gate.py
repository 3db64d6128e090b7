"""The gate of an export: another program opens the folder, from image file to logits, and must compute what we compute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_tune.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava_tune.errors import RunFailed
from llava_tune.evaluate.answer import Answerer
from llava_tune.model.generate import generate

TOLERANCE = 1e-3
GREEDY = 64


@dataclass(frozen=True)
class Report:
    """What the gate found.

    Attributes:
        questions: how many were asked, with images and without.
        ids_equal: both gave every prompt the same token ids.
        pixels: largest difference of preprocessed pixels.
        logits: largest difference of a logit, in fp32.
        greedy: of the new tokens (64 a question at most), how many agree, and of how many; of 0 where the program was asked for logits
            alone.
    """

    questions: int
    ids_equal: bool
    pixels: float
    logits: float
    greedy: tuple[int, int]

    def failures(self) -> list[str]:
        """What is not as it must be; empty if the gate is passed."""
        found = []
        if not self.ids_equal:
            found.append("the tokenizer or chat template gives other token ids")
        if not self.pixels <= TOLERANCE:
            found.append(f"the image preprocessing differs by {self.pixels:.2g}")
        if not self.logits <= TOLERANCE:
            found.append(f"the logits differ by {self.logits:.2g}, more than {TOLERANCE}")
        if self.greedy[0] != self.greedy[1]:
            found.append(f"{self.greedy[1] - self.greedy[0]} of {self.greedy[1]} greedy tokens differ")
        return found


def write_pictures(folder: Path) -> list[Path]:
    """Pictures of awkward sizes and kinds, drawn from a fixed seed, for a gate without the user's own."""
    rng = np.random.default_rng(0)
    paths = []
    for k, (width, height, mode) in enumerate([(640, 427, "RGB"), (333, 517, "RGB"), (75, 64, "L"), (203, 203, "P")]):
        coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8))
        path = folder / f"gate_{k}.{'png' if mode == 'P' else 'jpg'}"
        coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(path)
        paths.append(path)
    return paths


Conversation = list[tuple[str, str, list[Path]]]


def conversations(images: list[Path]) -> list[Conversation]:
    """What is asked: turns of (question, answer or "", images of that turn), about these images or without any."""
    asked: list[Conversation] = [[("What is in the picture?", "", [image])] for image in images]
    asked.append([("Say something about 猫 and 12.5 dogs.", "", [])])
    asked.append([("What color is it?", "blue", images[:1]), ("Is it a circle?", "", [])])
    if len(images) > 1:
        asked.append([("What differs between these?", "", images[:2])])
    return asked


@dataclass(frozen=True)
class Answer:
    """What a model makes of a conversation, in fp32.

    Attributes:
        ids: int64 [tokens], IMAGE_TOKEN_INDEX once a patch.
        pixels: float32 [images, 3, size, size], or None.
        logits: float32 [tokens, vocabulary].
        new: greedy token ids.
    """

    ids: np.ndarray
    pixels: np.ndarray | None
    logits: np.ndarray
    new: list[int]


def compare(ours: list[Answer], theirs: dict[str, np.ndarray], image_id: int | None, stop_ids: list[int]) -> Report:
    """What the folder's answers (of `ask_folder`) differ by from ours.

    Args:
        image_id: the id that theirs have once a patch.
    """
    ids_equal, pixels, logits, agree, total = True, 0.0, 0.0, 0, 0
    for k, our in enumerate(ours):
        expected = np.where(theirs[f"ids_{k}"] == image_id, IMAGE_TOKEN_INDEX, theirs[f"ids_{k}"])
        same = np.array_equal(our.ids, expected)
        ids_equal &= same
        if our.pixels is not None:
            pixels = max(pixels, _difference(theirs[f"pixels_{k}"], our.pixels))
        found = theirs[f"logits_{k}"][:, : our.logits.shape[1]]
        logits = max(logits, _difference(found, our.logits) if same else float("inf"))
        if f"new_{k}" not in theirs:
            continue
        their_new = _until(theirs[f"new_{k}"].tolist(), stop_ids)
        total += max(len(our.new), len(their_new), 1)
        agree += sum(a == b for a, b in zip(our.new, their_new, strict=False)) if our.new or their_new else 1
    return Report(len(ours), ids_equal, pixels, logits, (agree, total))


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")


def ask_folder(
    folder: Path, asked: list[Conversation], beside: Path, program: str = "opened.py"
) -> dict[str, np.ndarray]:
    """What transformers makes of the conversations, in a process of its own.

    Args:
        beside: a folder for its files.
        program: beside this file; `opened_llava.py` has LLaVA's own code instead.

    Raises:
        RunFailed: it can't open the folder.
    """
    messages = []
    for conversation in asked:
        said: list[dict[str, Any]] = []
        for question, answer, images in conversation:
            parts: list[dict[str, Any]] = [{"type": "image", "path": str(path.resolve())} for path in images]
            said.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
            if answer:
                said.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        messages.append(said)
    questions, out = beside / "questions.json", beside / "found.npz"
    questions.write_text(json.dumps({"questions": messages, "max_new_tokens": GREEDY}))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(program), folder.resolve(), questions, out],
        capture_output=True,
        text=True,
        cwd=beside,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RunFailed(f"{program} can't open it: {done.stderr.strip()[-2000:]}")
    with np.load(out) as found:
        return dict(found)


def laid_out(answerer: Answerer, conversation: Conversation) -> tuple[list[int], np.ndarray, torch.Tensor | None]:
    """A conversation up to where its answer begins, as our model takes it.

    Returns:
        (its prompt, the same as int64 [tokens] with IMAGE_TOKEN_INDEX once a patch, float32 [images, 3, size, size] or None)
    """
    texts = [("\n".join([*[IMAGE_PLACEHOLDER] * len(paths), q]), a) for q, a, paths in conversation]
    prompt = answerer.prompt(texts[:-1], texts[-1][0])
    pixels = [answerer.transform.open(path) for _, _, paths in conversation for path in paths]
    patches = answerer.llava.vision.tokens if answerer.llava.vision is not None else 1
    ids = np.repeat(np.array(prompt), np.where(np.array(prompt) == IMAGE_TOKEN_INDEX, patches, 1))
    return prompt, ids, torch.stack(pixels) if pixels else None


def ask_ours(answerer: Answerer, conversation: Conversation) -> Answer:
    """What our model makes of a conversation."""
    llava: Any = answerer.llava
    prompt, ids, stacked = laid_out(answerer, conversation)
    device = next(llava.parameters()).device
    with torch.inference_mode():
        embeddings = llava.embed(
            torch.from_numpy(ids)[None].to(device), None if stacked is None else stacked.to(device)
        )
        logits = llava.llm(inputs_embeds=embeddings, use_cache=False).logits[0].float().cpu().numpy()
    new = generate(llava, [prompt], stacked, stop_ids=answerer.layout.stop_ids, max_new_tokens=GREEDY)[0]
    return Answer(ids, None if stacked is None else stacked.numpy(), logits, new)


def _until(ids: list[int], stops: list[int]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stops), ids)


def sentence(report: Report, program: str) -> str:
    """The report as a person reads it."""
    greedy = f", {report.greedy[0]} of {report.greedy[1]} greedy tokens agree" if report.greedy[1] else ""
    return (
        f"opened by {program} in a process of its own, {report.questions} questions: token ids equal, pixels differ by at most "
        f"{report.pixels:.1e}, logits by {report.logits:.1e}{greedy}"
    )


def write_report(folder: Path, report: Report, dtype: torch.dtype) -> None:
    """gate.json in the export."""
    import transformers

    facts = asdict(report) | {
        "tolerance": TOLERANCE,
        "weights": str(dtype).removeprefix("torch."),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    (folder / "gate.json").write_text(json.dumps(facts, indent=1))
