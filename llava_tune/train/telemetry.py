"""What a run says of itself: metrics.jsonl, a progress bar or plain lines, a loss curve."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava_tune.data import LlavaDataset
from llava_tune.data.order import BatchOrder
from llava_tune.errors import InputError

_LINE_SECONDS = 5.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the line that a kill cut off
    return rows


class Telemetry(TrainerCallback):
    """Writes one line a logging step, on rank 0; on resume, lines after the resumed step go.

    A line has: step, epoch, loss, grad_norm, learning_rate, tokens_per_second and supervised_tokens_per_second (all
    ranks, image patches counted, padding not), samples_per_second, padding (share of the slots), data_wait (share of the
    time), memory_gb (peak, this rank), seconds.
    """

    def __init__(
        self,
        work_dir: Path,
        dataset: LlavaDataset,
        max_bad_share: float,
        start_step: int,
        order: BatchOrder,
        main: bool,
    ) -> None:
        self.path = work_dir / "metrics.jsonl"
        self.dataset, self.max_bad_share = dataset, max_bad_share
        self.steps_per_epoch, self.total_steps, self.main = order.steps_per_epoch, order.total_steps, main
        self.trainer: Any = None
        self._since = time.monotonic()
        self._step = start_step
        self._said = 0.0
        self._bar: Any = None
        self._task: Any = None
        if main:
            kept = [row for row in read_metrics(self.path) if row["step"] <= start_step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()
        if self.main and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self.total_steps, completed=state.global_step, text="")
            self._bar.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar:
            self._bar.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        counts, data_seconds, bad_images = self._counts()
        self._check_bad_images(bad_images)
        if not self.main:
            return
        seconds = time.monotonic() - self._since
        steps = state.global_step - self._step
        real, supervised, slots = counts
        row = {
            "step": state.global_step,
            "epoch": state.global_step / self.steps_per_epoch,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs["learning_rate"],
            "tokens_per_second": real / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "samples_per_second": steps * self.trainer.order.samples_per_step() / seconds,
            "padding": 1 - real / max(slots, 1),
            "data_wait": data_seconds / seconds,
            "memory_gb": _peak_memory() / 1e9,
            "seconds": seconds,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._show(row, seconds / max(steps, 1))
        self._since, self._step = time.monotonic(), state.global_step

    def _counts(self) -> tuple[list[int], float, int]:
        """Tokens, supervised tokens and slots of all ranks, seconds waited for data here, and bad images so far."""
        trainer = self.trainer
        quarantine = self.dataset.quarantine
        bad = len(quarantine.entries()) if self.main and quarantine else 0
        counts = torch.cat([trainer.tokens, torch.tensor([bad])])
        trainer.tokens = torch.zeros_like(trainer.tokens)
        seconds, trainer.data_seconds = trainer.data_seconds, 0.0
        if trainer.args.world_size > 1:
            counts = counts.to(trainer.args.device)
            torch.distributed.all_reduce(counts)
        *tokens, bad = counts.tolist()
        return tokens, seconds, bad

    def _check_bad_images(self, bad: int) -> None:
        """
        Raises:
            InputError: more than max_bad_share of the data's images could not be used; on every rank at once.
        """
        total = max(self.dataset.manifest["images"], 1)
        if bad > self.max_bad_share * total:
            path = self.dataset.quarantine.path if self.dataset.quarantine else ""
            raise InputError(
                f"{bad} of {total} images could not be used, more than dataset.max_bad_share ({self.max_bad_share:.1%}); they are "
                f"listed in {path}. Mend the image folder and --resume, or raise max_bad_share"
            )

    def _show(self, row: dict[str, Any], step_seconds: float) -> None:
        text = f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s, {row['padding']:.0%} padding"
        if self._bar:
            self._bar.update(self._task, completed=row["step"], text=text)
        elif time.monotonic() - self._said > _LINE_SECONDS or row["step"] == self.total_steps:
            self._said = time.monotonic()
            left = (self.total_steps - row["step"]) * step_seconds
            print(
                f"step {row['step']}/{self.total_steps}: {text}, about {left:,.0f} s left", file=sys.stderr, flush=True
            )


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def draw_loss_curve(work_dir: Path) -> Path | None:
    """loss.png from metrics.jsonl: each step, and smoothed. Returns its path, or None if nothing was logged."""
    rows = read_metrics(work_dir / "metrics.jsonl")
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    window = max(1, len(losses) // 30)
    smooth = [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - window + 1) : i + 1])]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="#08519c", linewidth=2, label=f"mean of {window}")
    axes.set(xlabel="optimizer step", ylabel="loss (mean over supervised tokens)", title=work_dir.name)
    if min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    path = work_dir / "loss.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
