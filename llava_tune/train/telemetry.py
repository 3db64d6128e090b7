"""What a run says of itself: metrics.jsonl, TensorBoard, a progress bar or plain lines, a loss curve."""

from __future__ import annotations

import json
import math
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava_tune.constants import IMAGE_TOKEN_INDEX
from llava_tune.data import LlavaDataset
from llava_tune.data.order import BatchOrder
from llava_tune.errors import InputError
from llava_tune.model.flops import StepFlops, device_peak

_LINE_SECONDS = 5.0
_SMOOTHED = 50
_SLOW_FORWARD = 1.3
_SLOW_DATA = 0.2
_COUNTS = ("tokens", "supervised", "slots", "pairs", "patches")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the line that a kill cut off
    return rows


class Meter:
    """Counts what this rank's batches hold and where its time goes, between two logging steps.

    Attributes:
        data_seconds: waited for the next batch.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(len(_COUNTS), dtype=torch.int64)
        self.data_seconds = 0.0
        self._forward = 0.0
        self._events: list[tuple[Any, Any]] = []

    def count(self, batch: dict[str, Any]) -> None:
        """Add a batch: its tokens, padding not among them; (query, key) pairs; image patches."""
        positions = batch["position_ids"].to(torch.int64)  # padding is 0, and so is the first token of each sample
        starts = int(((positions[:, :-1] == 0) & (positions[:, 1:] == 1)).sum())
        later = positions > 0
        tokens = int(later.sum()) + starts
        pairs = int(positions.sum() + later.sum()) + starts
        supervised = int((batch["labels"] >= 0).sum())
        patches = int((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum())
        self.counts += torch.tensor([tokens, supervised, positions.numel(), pairs, patches])

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.data_seconds += time.monotonic() - started

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass; on a GPU timed there, without making the host wait."""
        if torch.cuda.is_available():
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            started = time.monotonic()
            yield
            self._forward += time.monotonic() - started

    def take(self) -> tuple[torch.Tensor, float, float]:
        """(counts int64 [5], seconds waited for data, seconds of forward passes) since the last call."""
        if self._events:
            torch.cuda.synchronize()
            self._forward += sum(a.elapsed_time(b) for a, b in self._events) / 1000
        taken = self.counts, self.data_seconds, self._forward
        self.counts = torch.zeros_like(self.counts)
        self.data_seconds, self._forward, self._events = 0.0, 0.0, []
        return taken


class Telemetry(TrainerCallback):
    """Measures at each logging step, and writes it on rank 0; on resume, lines after the resumed step go.

    A line has: step, epoch, loss (null if it was no number), loss_smooth (mean of the last 50 lines), grad_norm,
    grad_norm_vision, grad_norm_projector, grad_norm_llm, learning_rate, tokens_per_second and supervised_tokens_per_second
    (all ranks, image patches counted, padding not), samples_per_second, tflops (model operations a second of one device, / 1e12:
    `model.flops`), mfu (its share of the device's peak; null where that isn't known), padding (share of the slots), data_wait (share
    of the time, the slowest rank's), memory_gb (peak, this rank), seconds.
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
        self.order, self.main = order, main
        self.meter = Meter()
        self.costs: StepFlops | None = None
        self.image_tokens = 1
        self._hosts: list[str] = []
        self._warned: set[str] = set()
        self._since = time.monotonic()
        self._step = start_step
        self._said = 0.0
        self._bar: Any = None
        self._task: Any = None
        self._recent: deque[float] = deque(maxlen=_SMOOTHED)
        if main:
            kept = [row for row in read_metrics(self.path) if row["step"] <= start_step]
            self._recent.extend(row["loss"] for row in kept[-_SMOOTHED:] if row["loss"] is not None)
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hosts = [socket.gethostname()]
        if args.world_size > 1:
            self._hosts = [""] * args.world_size
            torch.distributed.all_gather_object(self._hosts, socket.gethostname())
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
            self._task = self._bar.add_task("", total=self.order.total_steps, completed=state.global_step, text="")
            self._bar.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar:
            self._bar.stop()

    def measure(self, step: int, loss: float, args: Any) -> dict[str, float | None]:
        """What a logging step adds to the Trainer's own figures; every rank calls it.

        Raises:
            InputError: more than max_bad_share of the data's images could not be used; on every rank at once.
        """
        counts, data_waits, forwards, bad = self._gather(args)
        self._check_bad_images(bad)
        if not self.main:
            return {}
        seconds, steps = time.monotonic() - self._since, step - self._step
        self._since, self._step = time.monotonic(), step
        self._name_slow_ranks(data_waits, forwards, seconds)
        if math.isfinite(loss):
            self._recent.append(loss)
        flops, mfu = self._flops(counts, seconds, args)
        return {
            "loss_smooth": statistics.fmean(self._recent) if self._recent else None,
            "tokens_per_second": counts["tokens"] / seconds,
            "supervised_tokens_per_second": counts["supervised"] / seconds,
            "samples_per_second": steps * self.order.samples_per_step() / seconds,
            "tflops": flops / 1e12,
            "mfu": mfu,
            "padding": 1 - counts["tokens"] / max(counts["slots"], 1),
            "data_wait": max(data_waits) / seconds,
            "memory_gb": _peak_memory() / 1e9,
            "seconds": seconds,
        }

    def _gather(self, args: Any) -> tuple[dict[str, int], list[float], list[float], int]:
        """Counts of all ranks together, seconds of each rank, and bad images so far."""
        quarantine = self.dataset.quarantine
        bad = len(quarantine.entries()) if self.main and quarantine else 0
        counts, data, forward = self.meter.take()
        counts = torch.cat([counts, torch.tensor([bad])]).to(args.device)
        times = torch.tensor([data, forward], dtype=torch.float32, device=args.device)
        everyone = [times]
        if args.world_size > 1:
            torch.distributed.all_reduce(counts)
            everyone = [torch.zeros_like(times) for _ in range(args.world_size)]
            torch.distributed.all_gather(everyone, times)
        *found, bad = counts.tolist()
        waits, forwards = torch.stack(everyone).T.tolist()
        return dict(zip(_COUNTS, found, strict=True)), waits, forwards, bad

    def _flops(self, counts: dict[str, int], seconds: float, args: Any) -> tuple[float, float | None]:
        """(model operations a second of one device, their share of its peak)."""
        assert self.costs is not None
        images = counts["patches"] / max(self.image_tokens, 1)
        work = self.costs.of(counts["tokens"], counts["pairs"], counts["supervised"], images)
        each = work / seconds / max(args.world_size, 1)
        peak = device_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() and args.bf16 else None
        return each, each / peak if peak else None

    def _name_slow_ranks(self, waits: list[float], forwards: list[float], seconds: float) -> None:
        """Say once of each rank that holds the others up."""
        middle = statistics.median(forwards)
        for rank, (wait, forward) in enumerate(zip(waits, forwards, strict=True)):
            others = [w for k, w in enumerate(waits) if k != rank]
            where = f"rank {rank} on {self._hosts[rank]}"
            if others and wait > _SLOW_DATA * seconds and wait > 2 * max(others):
                self._warn(
                    f"{where} waits for data", f"{wait / seconds:.0%} of the time, the others don't: look at its disk"
                )
            if len(waits) > 2 and forward > _SLOW_FORWARD * middle and forward - middle > 0.1 * seconds:
                self._warn(
                    f"{where} is slow", f"its forward passes take {forward / middle:.1f} times the median rank's"
                )

    def _warn(self, what: str, how_much: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            print(f"warning: {what}: {how_much}", file=sys.stderr, flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not self.main or logs is None or "tokens_per_second" not in logs:
            return
        row = {"step": state.global_step, "mfu": None, **logs, "epoch": state.global_step / self.order.steps_per_epoch}
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._show(row)

    def _check_bad_images(self, bad: int) -> None:
        total = max(self.dataset.manifest["images"], 1)
        if bad > self.max_bad_share * total:
            path = self.dataset.quarantine.path if self.dataset.quarantine else ""
            raise InputError(
                f"{bad} of {total} images could not be used, more than dataset.max_bad_share ({self.max_bad_share:.1%}); they are "
                f"listed in {path}. Mend the image folder and --resume, or raise max_bad_share"
            )

    def _show(self, row: dict[str, Any]) -> None:
        total = self.order.total_steps
        loss = "no number" if row["loss"] is None else f"{row['loss']:.4f}"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s" + (f", {row['mfu']:.0%} MFU" if row["mfu"] else "")
        text = f"loss {loss}, {speed}, {row['padding']:.0%} padding"
        if row["data_wait"] > 0.1:
            text += f", {row['data_wait']:.0%} waiting for data"
        if self._bar:
            self._bar.update(self._task, completed=row["step"], text=text)
        elif time.monotonic() - self._said > _LINE_SECONDS or row["step"] == total:
            self._said = time.monotonic()
            per_step = row["samples_per_second"] and self.order.samples_per_step() / row["samples_per_second"]
            left = (total - row["step"]) * per_step
            print(f"step {row['step']}/{total}: {text}, about {left:,.0f} s left", file=sys.stderr, flush=True)


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def draw_loss_curve(work_dir: Path) -> Path | None:
    """loss.png from metrics.jsonl: each step, and smoothed. Returns its path, or None if nothing was logged."""
    rows = [row for row in read_metrics(work_dir / "metrics.jsonl") if row["loss"] is not None]
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
