"""Seconds that training stands still for a checkpoint: written while it goes on, and waited for.

python benchmarks/checkpoint.py [--width 768] [--layers 8] [--steps 20] [--every 5] [--rounds 3] [--deepspeed deepspeed_zero2]

A language model of random weights is trained in full, in turns with and without training.save_in_background. Still: the median time
within a save, of which the first of a run is left out. Run: from the first step to the last checkpoint's name, the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from train import CONFIG, write_data


def one(arguments: list[str]) -> None:
    """A run whose saves are timed; prints the seconds of each, and of the run."""
    import time

    from llava_tune.cli.main import main as command
    from llava_tune.train.trainer import LlavaTrainer

    saves: list[float] = []
    save, train = LlavaTrainer._save_checkpoint, LlavaTrainer.train

    def timed_save(self, *more):  # type: ignore[no-untyped-def]
        began = time.monotonic()
        save(self, *more)
        saves.append(time.monotonic() - began)

    def timed_train(self, **more):  # type: ignore[no-untyped-def]
        began = time.monotonic()
        train(self, **more)
        self.saver.wait()
        print(json.dumps({"saves": saves, "run": time.monotonic() - began}))

    LlavaTrainer._save_checkpoint, LlavaTrainer.train = timed_save, timed_train  # type: ignore[method-assign,assignment]
    sys.argv[1:] = arguments
    command()


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--deepspeed")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    from llava_tune.demo.small import texts_of, write_language_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, 200)
        texts = texts_of([folder / "data.json"])
        write_language_model(
            folder / "llm", texts, vocab_size=4096, width=options.width, layers=options.layers, heads=8
        )
        vision = {"image_size": 28, "patch_size": 14, "width": 64, "layers": 2, "head_width": 32}
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        (folder / "vision.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
        (folder / "c.py").write_text(CONFIG.format(folder=str(folder)))
        command = [sys.executable, __file__, "--one", "finetune", str(folder / "c.py"), "--dataset.max-length", "512"]
        command += [
            "--dataset.max-bad-share",
            "0.2",
            "--training.global-batch-size",
            "4",
            "--training.max-steps",
            str(options.steps),
        ]
        command += ["--training.save-steps", str(options.every)]
        command += ["--deepspeed", options.deepspeed] if options.deepspeed else []
        ways = {"waited for": ["--training.no-save-in-background"], "in the background": []}
        still: dict[str, list[float]] = {way: [] for way in ways}
        runs: dict[str, list[float]] = {way: [] for way in ways}
        size = 0
        for k in range(options.rounds):
            for way, flags in ways.items():
                work_dir = folder / f"{way}-{k}"
                done = subprocess.run(
                    [*command, *flags, "--work-dir", str(work_dir)], check=True, stdout=subprocess.PIPE, text=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                still[way] += found["saves"][1:]
                runs[way].append(found["run"])
                (last, *_) = work_dir.glob("checkpoint-*")
                size = sum(f.stat().st_size for f in last.rglob("*") if f.is_file())
                subprocess.run(["rm", "-r", str(work_dir)], check=True)
    print(f"checkpoints of {size / 1e9:.2f} GB, {options.steps // options.every} in {options.steps} steps\n")
    print("| written | still for a save, s | run, s |\n|-|-:|-:|")
    for way in ways:
        print(f"| {way} | {statistics.median(still[way]):.2f} | {statistics.median(runs[way]):.1f} |")


if __name__ == "__main__":
    main()
