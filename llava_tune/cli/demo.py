"""llava-tune demo"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from llava_tune.errors import EXIT_RUN_FAILED, InputError


@dataclass
class Options:
    """The whole road on a laptop CPU, in minutes: draw data, prepare, pretrain, fine-tune, evaluate.

    Each step is one of the commands that you would run yourself, and is shown before it runs.
    """

    work_dir: str = "work_dirs/demo"
    """Folder for everything that the demo makes."""
    images: int = 3000
    """Training images to draw."""
    test_images: int = 200
    """Held-out images; six questions are asked of each."""
    seed: int = 1
    """Seed of the pictures."""
    export: bool = False
    """See with a ViT as CLIP has instead of convolutions, which takes about two minutes more, and export the result for transformers."""
    restart: bool = False
    """Remove what an earlier demo left in the work dir, and begin anew."""


def main(arguments: list[str]) -> None:
    """Run the demo."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune demo", use_underscores=False)
    folder = Path(options.work_dir)
    if folder.exists():
        if not options.restart:
            raise InputError(f"{folder} is there already. `llava-tune demo --restart` removes it and begins anew")
        shutil.rmtree(folder)
    seconds: dict[str, float] = {}
    _make(options, folder, seconds)
    os.environ["LLAVA_TUNE_DEMO"] = str(folder)
    stages = [("pretrain", "demo_pretrain", "captions"), ("finetune", "demo_finetune", "train")]
    for verb, config, data in stages:
        store = folder / "store" / data
        _run(seconds, f"prepare {data}", "prepare", config, "--save-folder", str(store))
        more = ["--dataset.offline-processed-text-folder", str(store)]
        if verb == "pretrain" and options.export:
            more += ["--training.epochs", "8"]  # a ViT learns shapes later
        if verb == "finetune":
            more += ["--model.init-from", str(_checkpoint(folder / "pretrain"))]
        _run(seconds, verb, verb, config, *more)
    checkpoint = _checkpoint(folder / "finetune")
    test = ("--data", str(folder / "data/test.json"), "--image-folder", str(folder / "data/images"))
    answers = folder / "answers.jsonl"
    _run(seconds, "evaluate", "evaluate", str(checkpoint), *test, "--output", str(answers), "--swap-images")
    if options.export:
        _run(seconds, "export", "export", str(checkpoint), str(folder / "exported"), "--dtype", "fp32")
    _summary(folder, answers, checkpoint, seconds)


def _make(options: Options, folder: Path, seconds: dict[str, float]) -> None:
    from llava_tune.demo.scenes import write_data
    from llava_tune.demo.small import texts_of, write_language_model, write_vision_tower

    started = time.monotonic()
    data = folder / "data"
    print(f"drawing {options.images} + {options.test_images} pictures into {data}", flush=True)
    write_data(data, train=options.images, test=options.test_images, seed=options.seed)
    print(f"training a small tokenizer on their texts: {folder / 'llm'}", flush=True)
    write_language_model(folder / "llm", texts_of([data / "captions.json", data / "train.json"]))
    if options.export:
        write_vision_tower(folder / "vision.json", timm_model=None, patch_size=16)
    else:
        write_vision_tower(folder / "vision.json")
    seconds["draw"] = time.monotonic() - started


def _run(seconds: dict[str, float], what: str, *arguments: str) -> None:
    print(f"\n$ llava-tune {shlex.join(arguments)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "llava_tune.cli.main", *arguments]).returncode
    seconds[what] = time.monotonic() - started
    if code:
        print(f"error: the step above failed with exit code {code}", file=sys.stderr)
        sys.exit(EXIT_RUN_FAILED)


def _checkpoint(work_dir: Path) -> Path:
    return max(work_dir.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))


def _summary(folder: Path, answers: Path, checkpoint: Path, seconds: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llava_tune.demo.picture import draw_answers, read_answers

    rows = read_answers(answers)
    right = sum(r["correct"] for r in rows)
    picture = draw_answers(rows, folder / "data/images", folder / "answers.png")
    table = Table(title="the demo")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for what, took in seconds.items():
        table.add_row(what, f"{took:.0f}")
    table.add_row("all", f"{sum(seconds.values()):.0f}", style="bold")
    print()
    Console().print(table)
    print(f"held-out accuracy: {right / len(rows):.1%} of {len(rows)} questions (baselines in the table above)")
    print(f"eight test images with question, answer and truth: {picture}")
    print(f"loss curves: {folder / 'pretrain/loss.png'}, {folder / 'finetune/loss.png'}")
    print(f"talk to it: llava-tune chat {checkpoint} --image {folder / 'data/images' / rows[0]['image'][0]}")
