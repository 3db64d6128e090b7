"""Useful tokens a second of training: packed, grouped by length, and padded as they come.

python benchmarks/train.py [--records 2000] [--steps 30] [--vocabulary 4096] [--trl-steps 8]

2,000 records with the length spread of LLaVA-665K (a log-normal of words, a third text only), images of 576 tokens, the same small model
and about the same tokens a step for all. A useful token is one of a sample, image patches counted, padding not. The first way is what
peers do: samples in random order, padded to the longest of a micro batch, one attention mask over the row. With --trl-steps, TRL's
SFTTrainer (`pip install trl`) trains the same model as `llava-tune export` writes it, with the same micro batch, a step each.
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

import numpy as np

CONFIG = """from llava_tune.config import *
run = Run(
    model=Model(
        llm=LanguageModel(name={folder!r} + "/llm", weights="random"),
        vision=VisionTower(name={folder!r} + "/vision.json", freeze=True),
    ),
    dataset=Dataset(data_path={folder!r} + "/data.json", image_folder={folder!r}, max_length=2048, num_workers=1),
    optimizer=Optimizer(learning_rate=1e-4),
    training=Training(global_batch_size=8, micro_batch_size=2, save_steps=100000),
)
"""
SDPA = ["--model.llm.attention", "sdpa"]
WAYS = {
    "padded, one mask a row (sdpa)": [
        *SDPA,
        "--training.no-group-by-length",
        "--training.global-batch-size",
        "16",
        "--training.micro-batch-size",
        "4",
    ],
    "padded, each sample alone": [
        "--training.no-group-by-length",
        "--training.global-batch-size",
        "16",
        "--training.micro-batch-size",
        "4",
    ],
    "grouped by length": ["--training.global-batch-size", "16", "--training.micro-batch-size", "4"],
    "packed": ["--training.packing", "--training.global-batch-size", "4", "--training.micro-batch-size", "2"],
}


def write_data(folder: Path, records: int) -> None:
    """Records of random words; one small image for all of them, so that decoding is not what is measured."""
    from PIL import Image

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (336, 336, 3), np.uint8)).save(folder / "image.jpg")
    words = [f"word{k}" for k in range(1500)]
    rows = []
    for k in range(records):
        total = int(np.clip(rng.lognormal(4.8, 0.9), 8, 1400))
        text = [words[i] for i in rng.integers(0, len(words), total)]
        cut = max(1, total // 3)
        image = k % 3 != 0
        said = [
            {"from": "human", "value": ("<image>\n" if image else "") + " ".join(text[:cut])},
            {"from": "gpt", "value": " ".join(text[cut:]) or "yes"},
        ]
        rows.append({"id": str(k), **({"image": "image.jpg"} if image else {}), "conversations": said})
    (folder / "data.json").write_text(json.dumps(rows))


def write_model(folder: Path, vocabulary: int) -> None:
    """A language model of width 64 and a tower of 576 patches, from random weights."""
    from llava_tune.demo.small import texts_of, write_language_model

    texts = texts_of([folder / "data.json"])
    write_language_model(folder / "llm", texts, vocab_size=4096, width=64, layers=2, heads=4)
    config = json.loads((folder / "llm/config.json").read_text())
    (folder / "llm/config.json").write_text(
        json.dumps({**config, "vocab_size": vocabulary, "max_position_embeddings": 4096})
    )
    vision = {"image_size": 336, "patch_size": 14, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    (folder / "vision.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))


def measure(folder: Path, name: str, steps: int) -> dict[str, float]:
    """One run; the median over its steps but the first three."""
    work_dir = folder / name.replace(" ", "_").replace(",", "")
    command = [sys.executable, "-m", "llava_tune.cli.main", "pretrain", folder / "c.py", "--work-dir", work_dir]
    more = ["--training.max-steps", str(steps), *WAYS[name]]
    subprocess.run([*map(str, command), *more], check=True, capture_output=True)
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()][3:]
    keys = (
        "tokens_per_second",
        "supervised_tokens_per_second",
        "samples_per_second",
        "padding",
        "data_wait",
        "memory_gb",
    )
    return {key: statistics.median(row[key] for row in rows) for key in keys}


def measure_trl(folder: Path, steps: int) -> float:
    """Useful tokens a second of TRL on the exported model."""
    (run,) = (folder / "packed").glob("checkpoint-*")
    export = [sys.executable, "-m", "llava_tune.cli.main", "export", run, folder / "hf", "--dtype", "fp32"]
    subprocess.run([*map(str, export)], check=True, capture_output=True)
    program, out = Path(__file__).with_name("trl_run.py"), folder / "trl.json"
    sizes = ["--batch", "4", "--accumulate", "1", "--steps", str(steps)]
    command = [sys.executable, program, folder / "hf", folder / "data.json", folder, out, *sizes]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return float(json.loads(out.read_text())["tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--trl-steps", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, options.records)
        write_model(folder, options.vocabulary)
        (folder / "c.py").write_text(CONFIG.format(folder=str(folder)))
        found = {way: measure(folder, way, options.steps) for way in options.ways}
        trl = measure_trl(folder, options.trl_steps) if options.trl_steps else None
    base = found[options.ways[0]]["tokens_per_second"]
    print(
        "| | useful tokens/s | times padded | supervised tokens/s | samples/s | padding | waiting for data | peak GB |"
    )
    print("|-|-:|-:|-:|-:|-:|-:|-:|")
    for way, row in found.items():
        print(
            f"| {way} | {row['tokens_per_second']:,.0f} | {row['tokens_per_second'] / base:.2f} | "
            f"{row['supervised_tokens_per_second']:,.0f} | {row['samples_per_second']:.2f} | {row['padding']:.1%} | "
            f"{row['data_wait']:.1%} | {row['memory_gb']:.2f} |"
        )
    if trl:
        packed = found["packed"]["tokens_per_second"]
        print(f"| TRL's SFTTrainer | {trl:,.0f} | {trl / base:.2f} | | | | | |\npacked is {packed / trl:.2f} times TRL")


if __name__ == "__main__":
    main()
