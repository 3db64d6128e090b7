"""Checkpoints: found, checked against the run that resumes from them, and never half-written."""

from __future__ import annotations

import errno
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_tune.config import Run
from llava_tune.constants import DATA_FINGERPRINT
from llava_tune.data.store import file_hash
from llava_tune.errors import InputError, SharedRunFailed
from llava_tune.model.factory import RUN_CONFIG
from llava_tune.model.llava import Llava

_NAME = re.compile(r"checkpoint-(\d+)$")
STAGING = ".saving"
FILES = "llava_tune_files.json"
"""Size and hash of each file of a checkpoint."""


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


def write_file_list(checkpoint: Path) -> None:
    """Write what `verify` compares with."""
    files = {
        str(path.relative_to(checkpoint)): [path.stat().st_size, file_hash(path)]
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    (checkpoint / FILES).write_text(json.dumps(files, indent=1))


def verify(checkpoint: Path, *, hashes: bool) -> None:
    """Compare a checkpoint's files with its list; one without a list (of another version) is taken as it is.

    Args:
        hashes: read every file; otherwise sizes only.

    Raises:
        InputError: a file is missing or another one.
    """
    if not (checkpoint / FILES).is_file():
        return
    known: dict[str, list[Any]] = json.loads((checkpoint / FILES).read_bytes())
    broken = [
        f"{name} is {'missing' if not path.is_file() else 'not what was written'}"
        for name, (size, digest) in known.items()
        if not (path := checkpoint / name).is_file()
        or path.stat().st_size != size
        or (hashes and file_hash(path) != digest)
    ]
    if broken:
        others = [p.name for p in checkpoints(checkpoint.parent) if p != checkpoint]
        hint = f"--resume {checkpoint.parent / others[-1]}" if others else "start a new run"
        raise InputError(f"{checkpoint} is broken: {'; '.join(broken[:3])}. Go on from another checkpoint: {hint}")


def check_space(work_dir: Path, llava: Any) -> None:
    """
    Raises:
        SharedRunFailed: a checkpoint doesn't fit on the disk; on every rank at once, before anything is written or removed.
    """
    last = checkpoints(work_dir)
    trained = sum(int(getattr(p, "ds_numel", p.numel())) for p in llava.parameters() if p.requires_grad)
    needed = sum(p.stat().st_size for p in last[-1].rglob("*") if p.is_file()) if last else 12 * trained
    free = torch.tensor(shutil.disk_usage(work_dir).free, dtype=torch.int64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        device = next(p.device for p in llava.parameters())
        free = free.to(device)
        torch.distributed.all_reduce(free, torch.distributed.ReduceOp.MIN)
    if int(free) < needed:
        kept = f"{last[-1]} is whole" if last else "there is no checkpoint yet"
        raise SharedRunFailed(
            f"{work_dir}: a checkpoint takes about {needed / 1e6:,.0f} MB, and {int(free) / 1e6:,.0f} MB are free. Nothing was written "
            f"or removed; {kept}. Make space, then --resume"
        )


def no_space(error: BaseException) -> bool:
    """Whether an error says that a disk is full; safetensors and torch.save say it in their own words."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or "No space left" in text or "PytorchStreamWriter failed" in text or "inline_container" in text


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


def gather_state(llava: Llava, keep: frozenset[str], main: bool) -> dict[str, Tensor]:
    """`Llava.trained_state`, whole weights also where ZeRO-3 has partitioned them: all ranks gather, and the one that is `main` keeps."""
    state = llava.trained_state(keep)
    partitioned = {n: p for n, p in llava.named_parameters() if n in state and hasattr(p, "ds_id")}
    if partitioned:
        import deepspeed

        for name, parameter in partitioned.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if main:
                    state[name] = parameter.detach().to("cpu", copy=True)
    return {name: value.detach().contiguous() for name, value in state.items()} if main else {}


def rotate(work_dir: Path, limit: int, best: Path | None) -> None:
    """Remove the oldest checkpoints until `limit` are left; the last and the best stay. A kill leaves each whole or absent."""
    found = checkpoints(work_dir)
    kept = {found[-1], best} & set(found)
    for checkpoint in reversed(found):
        if len(kept) < limit:
            kept.add(checkpoint)
    for checkpoint in found:
        if checkpoint not in kept:
            going = work_dir / STAGING / f".removed-{checkpoint.name}"
            checkpoint.rename(going)
            shutil.rmtree(going)


def clear_staging(work_dir: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    shutil.rmtree(work_dir / STAGING, ignore_errors=True)


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        torch.distributed.barrier()
