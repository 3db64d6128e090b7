"""Checkpoints: found, checked against the run that resumes from them, and never half-written."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_tune.config import Run
from llava_tune.errors import InputError
from llava_tune.model.factory import RUN_CONFIG
from llava_tune.model.llava import Llava

_NAME = re.compile(r"checkpoint-(\d+)$")
STAGING = ".saving"
DATA_FINGERPRINT = "llava_tune_data.json"


def checkpoints(work_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in work_dir.glob("checkpoint-*") if _NAME.search(p.name) and (p / RUN_CONFIG).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's name says."""
    match = _NAME.search(checkpoint.name)
    return int(match.group(1)) if match else 0


def find_resume(resume: str, work_dir: Path) -> Path | None:
    """The checkpoint that --resume means: 'latest' of the work dir (None if there is none yet), or a folder.

    Raises:
        InputError: the folder is not a checkpoint.
    """
    if resume == "latest":
        found = checkpoints(work_dir)
        return found[-1] if found else None
    folder = Path(resume)
    if not (folder / RUN_CONFIG).is_file():
        raise InputError(f"--resume {resume}: not a llava-tune checkpoint (no {RUN_CONFIG})")
    return folder


def check_resume(checkpoint: Path, run: Run, data_fingerprint: dict[str, Any]) -> None:
    """
    Raises:
        InputError: the checkpoint was made by a run that this one can't go on with; names each field and both values.
    """
    then, now = (
        _decisive(json.loads((checkpoint / RUN_CONFIG).read_text())),
        _decisive(json.loads(json.dumps(asdict(run)))),
    )
    differing = [
        f"{k}: the checkpoint has {then.get(k)}, the config says {now.get(k)}" for k in now if then.get(k) != now[k]
    ]
    known = json.loads((checkpoint / DATA_FINGERPRINT).read_text())
    differing += [
        f"data {k}: the checkpoint has {known.get(k)}, the store has {v}"
        for k, v in data_fingerprint.items()
        if known.get(k) != v
    ]
    if differing:
        raise InputError(
            f"can't resume from {checkpoint}: {'; '.join(differing)}. Resume with the config it was made with, or start a new run "
            "from its weights with model.init_from"
        )


def _decisive(run: dict[str, Any]) -> dict[str, Any]:
    """The fields that a resumed run must share, by their dotted names."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", {"model": run["model"], "optimizer": run["optimizer"]})
    for name in ("global_batch_size", "seed", "group_by_length", "packing"):
        flat[f"training.{name}"] = run["training"].get(name)
    return flat


def gather_state(llava: Llava, keep: frozenset[str]) -> dict[str, Tensor]:
    """`Llava.trained_state` on the CPU, whole weights also where ZeRO-3 has partitioned them (on rank 0)."""
    state = llava.trained_state(keep)
    partitioned = {n: p for n, p in llava.named_parameters() if n in state and hasattr(p, "ds_id")}
    if partitioned:
        import deepspeed

        for name, parameter in partitioned.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                state[name] = parameter.detach().cpu().clone()
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def clear_staging(work_dir: Path) -> None:
    """Remove what a killed run left half-written."""
    shutil.rmtree(work_dir / STAGING, ignore_errors=True)


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        torch.distributed.barrier()
