"""What a run will take: memory, steps, hours, disk; and which lever to pull where it doesn't fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_tune.config import Run
from llava_tune.data.plan import make_plan
from llava_tune.data.store import MANIFEST, read_manifest
from llava_tune.errors import InputError
from llava_tune.model.flops import step_flops
from llava_tune.model.memory import Memory, training_memory
from llava_tune.model.size import checkpoint_bytes, on_meta, parameter_counts
from llava_tune.model.tokens import image_tokens
from llava_tune.train.data import cached_store
from llava_tune.train.run import accumulation_steps

_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Device:
    """A GPU: bytes that can be used, and dense bf16 operations a second."""

    memory: float
    peak: float


@dataclass(frozen=True)
class TrainingPlan:
    """What a run takes; see `make_training_plan`.

    Attributes:
        parameters: (all, trained) by part.
        memory: of the config's micro batch, on each device.
        available: bytes of a device.
        samples, tokens, where: of an epoch, the mean of a sample, and where both are known from.
        flops: of the whole run. hours: at the stated utilisation. disk: bytes of the checkpoints kept.
        advice: what to do, in sentences.
    """

    parameters: dict[str, tuple[int, int]]
    memory: Memory
    available: float
    samples: int
    tokens: float
    where: str
    steps: int
    flops: float
    hours: float
    disk: int
    advice: list[str]


def _lengths(run: Run, samples: int | None, tokens: float | None) -> tuple[int, float, float, float, str]:
    """(samples, mean tokens, images a sample, share supervised, where this is known from)."""
    given = run.dataset.offline_processed_text_folder
    folder = Path(given) if given else None
    if folder is None and samples is None and run.dataset.all_sources():
        folder = cached_store(make_plan(run))
    if folder is not None and (folder / MANIFEST).is_file():
        facts = read_manifest(folder)
        n = max(facts["samples"], 1)
        return n, facts["tokens"] / n, facts["images"] / n, facts["supervised"] / max(facts["tokens"], 1), str(folder)
    if samples is None or tokens is None:
        raise InputError(
            "no prepared store says how long the samples are: run `llava-tune prepare` first, or give --samples and --tokens (a sample's mean, "
            "image patches counted)"
        )
    patches = image_tokens(run.model.vision)
    return samples, tokens, 1.0 if run.model.vision else 0.0, max(0.05, 1 - patches / tokens) / 2, "as given"


def make_training_plan(
    run: Run,
    device: Device,
    gpus: int,
    deepspeed: dict[str, Any] | None,
    mfu: float,
    samples: int | None = None,
    tokens: float | None = None,
) -> TrainingPlan:
    """Plan a run on `gpus` devices.

    Args:
        mfu: share of the device's peak that the run is thought to reach.
        samples, tokens: of an epoch and of a sample, where no store says it.

    Raises:
        InputError: the config doesn't fit together, or nothing says how long the samples are.
    """
    training = run.training
    accumulation_steps(run, gpus)
    count, mean, images, supervised, where = _lengths(run, samples, tokens)
    zero = (deepspeed or {}).get("zero_optimization", {})
    length = run.dataset.max_length if training.packing else min(run.dataset.max_length, math.ceil(1.5 * mean))
    in_row = length / mean if training.packing else 1.0
    settings: dict[str, Any] = {
        "ranks": gpus,
        "zero_stage": int(zero.get("stage", 0)),
        "offload_optimizer": zero.get("offload_optimizer", {}).get("device", "none") != "none",
        "bf16": training.precision != "fp32",
        "length": length,
        "checkpointing": training.gradient_checkpointing,
    }

    def memory_of(rows: int, **changes: Any) -> Memory:
        n = max(1, round(rows * in_row * images)) if run.model.vision else 0
        return training_memory(run.model, rows=rows, images=n, **{**settings, **changes})

    memory = memory_of(training.micro_batch_size)
    rows = count / in_row
    steps = training.max_steps or math.ceil(training.epochs * rows / training.global_batch_size)
    seen = steps * training.global_batch_size * in_row
    costs = step_flops(on_meta(run.model))
    all_tokens = seen * mean
    flops = costs.of(int(all_tokens), int(seen * mean * (mean + 1) / 2), int(all_tokens * supervised), seen * images)
    return TrainingPlan(
        parameters=parameter_counts(run.model),
        memory=memory,
        available=device.memory,
        samples=count,
        tokens=mean,
        where=where,
        steps=steps,
        flops=flops,
        hours=flops / (device.peak * mfu * gpus) / 3600,
        disk=checkpoint_bytes(run.model) * training.save_total_limit,
        advice=_advice(run, gpus, device, memory, memory_of, settings),
    )


def _advice(run: Run, gpus: int, device: Device, memory: Memory, memory_of: Any, settings: dict[str, Any]) -> list[str]:
    now = run.training.micro_batch_size
    if memory.total <= device.memory:
        best = now
        for rows in _MICRO_BATCHES:
            if rows > now and run.training.global_batch_size % (rows * gpus) == 0:
                if memory_of(rows).total > device.memory:
                    break
                best = rows
        more = f"the largest that fits is {best}" if best > now else "no larger one fits, or divides the global batch"
        return [f"micro batch {now} fits; {more}"]
    lines = [
        f"micro batch {now} does not fit: {memory.total / 2**30:,.1f} GiB of {device.memory / 2**30:,.1f}. What helps:"
    ]
    levers: list[tuple[str, dict[str, Any]]] = []
    if not settings["checkpointing"]:
        levers.append(("training.gradient_checkpointing=True", {"checkpointing": True}))
    presets = {1: "deepspeed_zero1", 2: "deepspeed_zero2", 3: "deepspeed_zero3"}
    levers += [(f"--deepspeed {name}", {"zero_stage": k}) for k, name in presets.items() if k > settings["zero_stage"]]
    levers.append(
        (
            "--deepspeed deepspeed_zero3_offload with checkpointing",
            {"zero_stage": 3, "offload_optimizer": True, "checkpointing": True},
        )
    )
    for name, changes in levers:
        total = memory_of(now, **changes).total
        lines.append(f"  {name}: {total / 2**30:,.1f} GiB{', fits' if total <= device.memory else ''}")
    if now > 1:
        one = memory_of(1).total
        lines.append(f"  training.micro_batch_size=1: {one / 2**30:,.1f} GiB{', fits' if one <= device.memory else ''}")
    if not run.model.llm.lora.rank and not run.model.llm.freeze:
        lines.append("  model.llm.freeze=True with model.llm.lora.rank=64 trains adapters instead of every weight")
    return lines
