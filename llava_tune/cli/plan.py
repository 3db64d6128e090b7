"""llava-tune plan CFG --gpus 8 --gpu a100-80g [--deepspeed deepspeed_zero2]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_tune.cli.options import FlatRun, parse
from llava_tune.config.shipped import deepspeed_config

DESCRIPTION = (
    "What a run takes, before it is queued: parameters, memory on each GPU by part, the largest micro batch that fits, steps, operations, "
    "hours, disk and price."
)
GIB = 2**30
GPUS = {
    "h200-141g": (139.8, 989e12),
    "h100-80g": (79.6, 989e12),
    "a100-80g": (79.3, 312e12),
    "a100-40g": (39.4, 312e12),
    "l40s-48g": (44.4, 362e12),
    "a10-24g": (22.1, 125e12),
    "rtx4090-24g": (23.5, 165e12),
}
"""GiB that a program can have, and dense bf16 operations a second (data sheets)."""
RESERVE = 0.1
"""Share of the memory left for CUDA's context, communication buffers and fragmentation."""


@dataclass
class Options:
    run: FlatRun
    gpus: int = 8
    """GPUs of all nodes together."""
    gpu: Literal["h200-141g", "h100-80g", "a100-80g", "a100-40g", "l40s-48g", "a10-24g", "rtx4090-24g"] = "h100-80g"
    """Kind of GPU."""
    deepspeed: str | None = None
    """A preset or JSON file, as in pretrain."""
    mfu: float = 0.4
    """Share of the GPU's peak that the run is thought to reach (metrics.jsonl of a short run says it)."""
    price: float | None = None
    """Of one GPU hour."""
    samples: int | None = None
    """Samples of an epoch, where no prepared store says it."""
    tokens: float | None = None
    """Mean tokens of a sample, image patches counted, where no prepared store says it."""


def main(arguments: list[str]) -> None:
    """Print the plan."""
    _, options = parse(Options, arguments, "plan", DESCRIPTION)
    from llava_tune.train.planning import Device, make_training_plan

    memory, peak = GPUS[options.gpu]
    plan = make_training_plan(
        options.run,
        Device(memory * GIB * (1 - RESERVE), peak),
        options.gpus,
        deepspeed_config(options.deepspeed) if options.deepspeed else None,
        options.mfu,
        options.samples,
        options.tokens,
    )
    _show(options, plan)


def _show(options: Options, plan: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    parts = Table(title="parameters")
    for name in ("part", "all", "trained"):
        parts.add_column(name, justify="left" if name == "part" else "right")
    for name, (count, trained) in plan.parameters.items():
        parts.add_row(name, f"{count / 1e6:,.1f} M", f"{trained / 1e6:,.1f} M")
    console.print(parts)

    memory = Table(title=f"memory on each {options.gpu}, micro batch {options.run.training.micro_batch_size}")
    memory.add_column("part")
    memory.add_column("GiB", justify="right")
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "total"):
        style = "bold" if name == "total" else None
        memory.add_row(name, f"{getattr(plan.memory, name) / GIB:,.2f}", style=style)
    memory.add_row(f"there are, without {RESERVE:.0%} of reserve", f"{plan.available / GIB:,.2f}")
    console.print(memory)
    for line in plan.advice:
        print(line)
    cost = plan.hours * options.gpus
    rows = {
        "samples an epoch": f"{plan.samples:,}",
        "tokens a sample, on average": f"{plan.tokens:,.0f}",
        "optimizer steps": f"{plan.steps:,}",
        "operations": f"{plan.flops / 1e18:,.1f} EFLOP",
        f"hours at {options.mfu:.0%} MFU on {options.gpus} GPUs": f"{plan.hours:,.1f}",
        "disk for checkpoints": f"{plan.disk / GIB:,.1f} GiB in {Path(options.run.work_dir or 'work_dirs')}",
        **({"price": f"{cost * options.price:,.0f} for {cost:,.1f} GPU hours"} if options.price is not None else {}),
    }
    run = Table(title="the run")
    run.add_column("what")
    run.add_column("how much", justify="right")
    for name, value in rows.items():
        run.add_row(name, value)
    console.print(run)
    print(f"samples and tokens: {plan.where}")
