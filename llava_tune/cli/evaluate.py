"""llava-tune evaluate CHECKPOINT --data FILE --image-folder DIR"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from llava_tune.errors import InputError, RunFailed

if TYPE_CHECKING:
    from llava_tune.evaluate import Evaluated


@dataclass
class Options:
    """Answer a question file in LLaVA's format (each round is a question) and score the answers by exact match; or a public
    benchmark, as its authors publish it, by its paper's metric. A run that was killed goes on where it was. NPROC_PER_NODE=N shares
    the questions among N processes."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a checkpoint, such as work_dirs/NAME/checkpoint-100."""
    data: str | None = None
    """Question file (needed without --harness): LLaVA JSON or JSONL; or a benchmark's file (mme: its folder)."""
    image_folder: str | None = None
    """Folder that the images' paths start from."""
    benchmark: Literal["vqav2", "textvqa", "gqa", "pope", "mme", "scienceqa", "mmbench", "refcoco"] | None = None
    """Which public benchmark the data is; by default LLaVA's format."""
    annotations: str | None = None
    """vqav2: the file of its answers."""
    output: str | None = None
    """File for the answers, one JSON object a line; by default answers.jsonl in the checkpoint's folder."""
    batch_size: int = 16
    """Questions answered at once."""
    max_new_tokens: int = 32
    """Tokens of an answer at most."""
    limit: int | None = None
    """Ask only the first this many."""
    temperature: float = 0.0
    """0: always the likeliest token; higher: more varied."""
    top_p: float = 1.0
    """With a temperature: draw among the likeliest tokens that make up this share."""
    seed: int = 0
    """Of drawn answers; they are the same again with the same batches."""
    launcher: Literal["none", "torchrun", "slurm"] = "none"
    """Who started this process. NPROC_PER_NODE=N starts N through torchrun by itself."""
    harness: Literal["lmms-eval"] | None = None
    """Export the checkpoint to CHECKPOINT/hf, if that is not there, and run it in lmms-eval instead."""
    tasks: str | None = None
    """With --harness: its tasks, such as mmbench_en_dev,pope."""
    harness_args: str = ""
    """With --harness: more of its own arguments, as on its command line (--harness-args="--include_path DIR")."""
    swap_images: bool = False
    """Also ask with each image swapped for another: shows what the model answers without looking."""


def main(arguments: list[str]) -> None:
    """Evaluate and print the scores."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune evaluate", use_underscores=False)
    if options.harness is not None:
        _run_harness(options)
        return
    data = options.data
    if data is None:
        raise InputError("evaluate needs --data FILE: the questions (or --harness lmms-eval --tasks NAMES)")
    from llava_tune.train.launch import (
        processes_to_start,
        rank,
        relaunch_under_torchrun,
        set_rank_variables,
        world_size,
    )

    if options.launcher == "none" and processes_to_start():
        relaunch_under_torchrun(["evaluate", *arguments])
    set_rank_variables(options.launcher, False)
    from llava_tune.evaluate import evaluate
    from llava_tune.model.generate import Sampling

    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if rank() == 0 and time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"answered {done:,} of {total:,}", file=sys.stderr, flush=True)

    result = evaluate(
        options.checkpoint,
        data,
        options.image_folder,
        output=options.output,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
        swap=options.swap_images,
        benchmark=options.benchmark,
        annotations=options.annotations,
        sampling=Sampling(options.temperature, options.top_p, options.seed if options.temperature else None),
        rank=rank(),
        world_size=world_size(),
        report=report,
    )
    if result is not None:
        print_scores(result)


def _run_harness(options: Options) -> None:
    """lmms-eval on the exported model, in a process of its own."""
    import importlib.util
    import shlex
    import subprocess

    if options.tasks is None:
        raise InputError("--harness lmms-eval needs --tasks NAMES, such as mmbench_en_dev,pope")
    if importlib.util.find_spec("lmms_eval") is None:
        raise InputError(
            "--harness lmms-eval needs the package lmms_eval, which is not installed. Run: pip install lmms-eval"
        )
    import torch

    from llava_tune.cli.serve import ready_export

    folder = ready_export(Path(options.checkpoint), None)
    device = "" if torch.cuda.is_available() else ",device=cpu,device_map=cpu"
    output = Path(options.output or folder.parent / "lmms-eval")
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_hf", "--model_args", f"pretrained={folder}{device}"]
    # llava_hf of lmms-eval takes one question at a time.
    command += ["--tasks", options.tasks, "--batch_size", "1", "--output_path", str(output), "--log_samples"]
    command += [*(["--limit", str(options.limit)] if options.limit else []), *shlex.split(options.harness_args)]
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    before = set(output.rglob("*results.json"))
    subprocess.run(command, check=False)  # its exit code is 0 after an error, too
    found = set(output.rglob("*results.json")) - before
    if not found:
        raise RunFailed("lmms-eval wrote no results: see what it printed above")
    print(f"lmms-eval's results: {', '.join(map(str, sorted(found)))}")


def print_scores(result: Evaluated) -> None:
    """The table of scores and the baselines."""
    from rich.console import Console
    from rich.table import Table

    if result.scores:
        print_benchmark(result)
        return
    table = Table(title="accuracy (exact match)")
    for name in ("question type", "right", "asked", "accuracy"):
        table.add_column(name, justify="left" if name == "question type" else "right")
    for kind, (right, asked) in sorted(result.accuracy.items(), key=lambda item: (item[0] == "all", item[0])):
        table.add_row(kind, f"{right:,}", f"{asked:,}", f"{right / asked:.1%}", style="bold" if kind == "all" else None)
    Console().print(table)
    print(f"best answer by the question alone: {result.question_alone:.1%}")
    if result.swapped is not None:
        print(f"with each image swapped for another: {result.swapped:.1%}")
    _print_files(result)


def print_benchmark(result: Evaluated) -> None:
    """The table of a benchmark's figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(result.answers_file))
    table.add_column("figure")
    table.add_column("value", justify="right")
    for k, (name, value) in enumerate(result.scores.items()):
        table.add_row(name, f"{value:,.1f}" if value > 1 else f"{value:.1%}", style="bold" if k == 0 else None)
    Console().print(table)
    if result.swapped is not None:
        print(f"right with each image swapped for another: {result.swapped:.1%}")
    _print_files(result)


def _print_files(result: Evaluated) -> None:
    path = result.answers_file
    print(f"every answer: {path}\nthe worst with their images: {path.with_name(f'{path.stem}-worst.html')}")
