"""A score while training: all ranks answer a share of a question file every N steps, and the best checkpoint is kept."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava_tune.config import Run
from llava_tune.constants import BEST
from llava_tune.data import BadImage, ImageTransform
from llava_tune.data.tokens.layout import Layout
from llava_tune.errors import InputError
from llava_tune.evaluate.benchmarks import BENCHMARKS, exactly_right, read_benchmark
from llava_tune.evaluate.metrics import Question
from llava_tune.evaluate.questions import read_questions
from llava_tune.model.generate import generate
from llava_tune.paths import write_whole
from llava_tune.train.checkpoint import step_of


class EvaluationCallback(TrainerCallback):
    """Scores the model; see config.Evaluation. Lines go to evaluation.jsonl, the score to every reporter as eval_score.

    Attributes:
        trainer: whose `log` takes the score; set once the trainer is there.
        alive: called with each batch of answers, so that a long evaluation isn't taken for a hang.
        best: the best score and the checkpoint that has it. (The Trainer's own state of that name would make it remove the last
            checkpoint at the end, where one is to be kept.)

    Raises:
        InputError: the questions or an image of theirs are wrong.
    """

    trainer: Any = None
    alive: Callable[[], None] = staticmethod(lambda: None)
    best: tuple[float, Path] | None = None

    def __init__(
        self, run: Run, layout: Layout, tokenizer: Any, transform: ImageTransform, work_dir: Path, rank: int, ranks: int
    ) -> None:
        self.config, self.layout, self.tokenizer = run.evaluation, layout, tokenizer
        self.transform, self.work_dir, self.rank, self.ranks = transform, work_dir, rank, ranks
        config = run.evaluation
        self.folder = Path(config.image_folder or run.dataset.image_folder or ".")
        path = Path(str(config.data_path))
        if config.benchmark is None:
            self.questions = read_questions(path, config.limit)
        else:
            annotations = Path(config.annotations) if config.annotations else None
            self.questions = read_benchmark(config.benchmark, path, annotations, config.limit)
        for question in self.questions[rank::ranks]:  # what is wrong is said before the first step
            for image in question.images:
                self._open(question, image)

    def _open(self, question: Question, image: str) -> torch.Tensor:
        try:
            return self.transform.load(self.folder, image)
        except BadImage as error:
            raise InputError(f"evaluation: question {question.id}: image {image}: {error}") from error

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        last = state.global_step == state.max_steps
        if not (state.global_step % self.config.every_steps == 0 or last):
            return
        began = time.monotonic()
        synced = bool(getattr(args, "deepspeed", None)) and self.ranks > 1
        answers = self._gather(self._answer_share(model, synced))
        scores = self._score(answers)
        name, score = next(iter(scores.items()))
        known = self.best
        best = known is None or score > known[0]
        if known is None or best:
            self.best = known = score, self.work_dir / f"checkpoint-{state.global_step}"
            control.should_save |= self.config.keep_best
        if self.rank == 0:
            row = {"step": state.global_step, "scores": scores, "questions": len(answers), "best": best}
            with (self.work_dir / "evaluation.jsonl").open("a") as file:
                file.write(json.dumps(row | {"seconds": round(time.monotonic() - began, 2)}) + "\n")
            note = "the best so far" if best else f"the best is that of step {step_of(known[1])}"
            print(
                f"evaluation at step {state.global_step}: {name} {_shown(score)} of {len(answers)}, {note}",
                file=sys.stderr,
                flush=True,
            )
        if self.trainer is not None:
            self.trainer.log({"eval_score": score})

    def name(self, best: tuple[float, Path]) -> None:
        """Name the best checkpoint, if it is there."""
        score, folder = best
        if folder.is_dir():
            write_whole(
                self.work_dir / BEST, json.dumps({"checkpoint": folder.name, "step": step_of(folder), "score": score})
            )

    def go_on_from(self, step: int) -> None:
        """Take the best of the run that is resumed at a step."""
        path = self.work_dir / BEST
        if step and path.is_file():
            known = json.loads(path.read_bytes())
            if known["step"] <= step and (self.work_dir / known["checkpoint"]).is_dir():
                self.best = known["score"], self.work_dir / known["checkpoint"]

    def _answer_share(self, model: Any, synced: bool) -> dict[int, str]:
        """Answers of this rank's questions, by their places; every rank makes the same number of calls (ZeRO-3 waits for all)."""
        mine = list(range(self.rank, len(self.questions), self.ranks))
        size = self.config.batch_size
        rounds = math.ceil(math.ceil(len(self.questions) / self.ranks) / size)
        found: dict[int, str] = {}
        for k in range(rounds):
            batch = mine[k * size : (k + 1) * size]
            asked = [self.questions[i] for i in batch] or self.questions[:1]
            pixels = [self._open(q, image) for q in asked for image in q.images]
            if not pixels and self.transform.size:
                pixels = [torch.zeros(3, self.transform.size, self.transform.size)]  # the same calls on every rank
            ids = generate(
                model,
                [self.layout.prompt(q.rounds, q.question) for q in asked],
                torch.stack(pixels) if pixels else None,
                stop_ids=self.layout.stop_ids,
                max_new_tokens=self.config.max_new_tokens,
                synced=synced,
            )
            self.alive()
            texts = [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
            found |= dict(zip(batch, texts, strict=False))
        return found

    def _gather(self, mine: dict[int, str]) -> list[str]:
        shares: list[Any] = [mine]
        if self.ranks > 1:
            shares = [None] * self.ranks
            torch.distributed.all_gather_object(shares, mine)
        found = {place: answer for share in shares for place, answer in share.items()}
        return [found[i] for i in range(len(self.questions))]

    def _score(self, answers: list[str]) -> dict[str, float]:
        answered = list(zip(self.questions, answers, strict=True))
        if self.config.benchmark is not None:
            return BENCHMARKS[self.config.benchmark].score(answered)
        return {"accuracy": sum(exactly_right(q, a) for q, a in answered) / len(answered)}


def _shown(score: float) -> str:
    return f"{score:.1%}" if score <= 1 else f"{score:,.1f}"
