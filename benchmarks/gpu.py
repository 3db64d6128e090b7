"""A 7B-shaped LLaVA on one GPU: tokens a second and model FLOPs utilisation, with and without each lever.

python benchmarks/gpu.py [--length 2048 4096] [--steps 12] [--tiny]
python benchmarks/gpu.py --flops

The language model has InternLM2-7B's shape, the tower is CLIP-ViT-L/14-336, both from random weights; records are those of
benchmarks/train.py. --tiny runs the same commands on a toy shape (a CPU will do), to see that the script works. --flops prints what a
step of the published recipes costs, counted from the shapes alone; it needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from train import write_data, write_model

INTERNLM2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 92544,
    "max_position_embeddings": 32768,
}
CONFIG = """from llava_tune.config import *
run = Run(
    model=Model(
        llm=LanguageModel(name={folder!r} + "/llm", weights="random"),
        vision=VisionTower(name={vision!r}, freeze=True),
    ),
    dataset=Dataset(
        data_path={folder!r} + "/data.json", image_folder={folder!r}, max_length=4096, num_workers=8, max_bad_share=0.1
    ),
    optimizer=Optimizer(learning_rate=1e-5),
    training=Training(global_batch_size=8, micro_batch_size=1, save_steps=100000, packing=True, gradient_checkpointing=True),
)
"""
LORA = ["--model.llm.freeze", "--model.llm.lora.rank", "64"]
FULL = ["--deepspeed", "deepspeed_zero2_offload"]
WAYS: dict[str, list[str]] = {
    "LoRA, packed": LORA,
    "LoRA, packed, sdpa with a mask": [*LORA, "--model.llm.attention", "sdpa"],
    "LoRA, packed, flash attention": [*LORA, "--model.llm.attention", "flash_attention_2"],
    "LoRA, packed, no checkpointing": [*LORA, "--training.no-gradient-checkpointing"],
    "LoRA, grouped by length": [*LORA, "--training.no-packing", "--training.micro-batch-size", "2"],
    "QLoRA, packed": [*LORA, "--model.llm.quantization", "nf4"],
    "projector, packed": ["--model.llm.freeze"],
    "full, packed, optimizer on the CPU": FULL,
}


def measure(folder: Path, name: str, length: int, steps: int) -> dict[str, Any]:
    """One run: medians over its steps but the first three; or why it failed."""
    work_dir = folder / f"{name}-{length}".replace(" ", "_").replace(",", "")
    command = [sys.executable, "-m", "llava_tune.cli.main", "finetune", folder / "c.py", "--work-dir", work_dir]
    more = ["--dataset.max-length", str(length), "--training.max-steps", str(steps), *WAYS[name]]
    done = subprocess.run([*map(str, command), *more], capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:100]}
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()][3:]
    keys = ("tokens_per_second", "tflops", "mfu", "memory_gb", "data_wait")
    return {key: statistics.median(row[key] or 0 for row in rows) for key in keys}


def print_flops() -> None:
    """Operations of the published recipes' steps."""
    from llava_tune.config import LanguageModel, Lora, Model, VisionTower
    from llava_tune.model.flops import step_flops
    from llava_tune.model.size import on_meta

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **INTERNLM2_7B}))
        vision = VisionTower(name="ViT-L-14-336-quickgelu")
        shapes = {
            "projector (stage 1)": LanguageModel(name=name, weights="random", freeze=True),
            "LoRA (stage 2)": LanguageModel(name=name, weights="random", freeze=True, lora=Lora(rank=64)),
            "full (stage 2)": LanguageModel(name=name, weights="random"),
        }
        print(
            "| InternLM2-7B, CLIP-L/14-336 | a token, GFLOP | an image, TFLOP | a sample of 900 tokens with an image, TFLOP |"
        )
        print("|-|-:|-:|-:|")
        for what, llm in shapes.items():
            costs = step_flops(on_meta(Model(llm=llm, vision=vision)))
            sample = costs.of(900, 900 * 901 // 2, 200, 1)
            print(f"| {what} | {costs.token / 1e9:.1f} | {costs.image / 1e12:.2f} | {sample / 1e12:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--flops", action="store_true")
    options = parser.parse_args()
    if options.flops:
        print_flops()
        return
    print("| way | row | tokens/s | TFLOP/s | MFU | peak GB | waiting for data |\n|-|-:|-:|-:|-:|-:|-:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, options.records)
        write_model(folder, 4096)
        if not options.tiny:
            config = json.loads((folder / "llm/config.json").read_text())
            (folder / "llm/config.json").write_text(json.dumps({**config, **INTERNLM2_7B}))
        vision = str(folder / "vision.json") if options.tiny else "ViT-L-14-336-quickgelu"
        (folder / "c.py").write_text(CONFIG.format(folder=str(folder), vision=vision))
        for length in options.length:
            for way in WAYS:
                row = measure(folder, way, length, options.steps)
                if "failed" in row:
                    print(f"| {way} | {length} | {row['failed']} | | | | |", flush=True)
                    continue
                print(
                    f"| {way} | {length} | {row['tokens_per_second']:,.0f} | {row['tflops']:.2f} | {row['mfu']:.1%} | "
                    f"{row['memory_gb']:.1f} | {row['data_wait']:.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
