"""A ZeRO checkpoint on another number of ranks: through DeepSpeed's universal checkpoint (https://arxiv.org/abs/2406.18820),
made once, where it is needed, before the ranks meet."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from llava_tune.errors import InputError, SharedInputError

RESHARDED = ".resharded"


def resharded(
    checkpoint: Path, work_dir: Path, deepspeed: dict[str, Any] | None, ranks: int, speak: bool
) -> Path | None:
    """The folder to load the engine's state from where the checkpoint's own doesn't fit; None where it does.

    Args:
        checkpoint: to resume from.
        work_dir: the run's, where the converted state lies until it is loaded: as large as the checkpoint's optimizer state.
        deepspeed: the run's DeepSpeed config, or None.
        ranks: how many there are now.
        speak: print what is waited for (one rank does).

    Raises:
        InputError: the checkpoint is broken, or was made with DeepSpeed and the run is without, or the other way round, or only one
            of them with ZeRO-3; or its state can't be converted.
    """
    shards = sorted(checkpoint.glob("global_step*/*_optim_states.pt"))
    # ZeRO-3 writes each rank's part of the weights, too; stages 1 and 2 read one another's.
    in_parts = bool(list(checkpoint.glob("global_step*/zero_pp_rank_0_*_model_states.pt")))
    made = _named((checkpoint / "latest").is_file(), 3 if in_parts else 2 if shards else 0)  # latest is DeepSpeed's
    stage = int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))
    now = _named(deepspeed is not None, stage)
    if made != now:
        option = f" (--deepspeed deepspeed_zero{3 if in_parts else 2})" if shards else ""
        raise SharedInputError(
            f"can't resume from {checkpoint}: it was made {made}, and its optimizer's state can't be read {now}. Resume {made}{option}, "
            "or start a new run from its weights with model.init_from"
        )
    if not shards or len(shards) == ranks:
        return None
    from llava_tune.train.checkpoint import FILES
    from llava_tune.train.waiting import once

    # Not its name alone: another checkpoint's state may be left there by a run that was killed.
    listed = checkpoint / FILES
    identity = str(checkpoint.resolve()).encode() + (listed.read_bytes() if listed.is_file() else b"")
    target = work_dir / RESHARDED / f"{checkpoint.name}-{hashlib.sha256(identity).hexdigest()[:12]}"
    once(
        lock=target.with_suffix(".lock"),
        is_done=target.is_dir,
        work=lambda: _convert(checkpoint, shards[0].parent, target, f"{len(shards)} rank(s) to {ranks}"),
        progress=lambda: f"{sum(len(files) for _, _, files in os.walk(target.parent))} files",  # they come and go
        what=f"{checkpoint}'s optimizer state to be converted",
        speak=speak,
    )
    return target


def _convert(checkpoint: Path, state: Path, target: Path, what: str) -> None:
    from llava_tune.train.checkpoint import verify

    verify(checkpoint, hashes=True)
    size = sum(f.stat().st_size for f in state.iterdir())
    free = shutil.disk_usage(target.parent).free
    if free < 2 * size:  # fragments and what they are merged to
        raise InputError(
            f"--resume {checkpoint}: its optimizer state must be converted from {what}, which takes about {2 * size / 1e6:,.0f} MB in "
            f"{target.parent}, and {free / 1e6:,.0f} MB are free. Make space, or resume on as many ranks as it was made on"
        )
    print(f"converting {checkpoint}'s optimizer state from {what}, once", file=sys.stderr, flush=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    for left in target.parent.glob(f"{target.name}.*.part"):
        shutil.rmtree(left)
    part.mkdir()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(state), "--output_folder", str(part / state.name)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        shutil.rmtree(part)
        last = "\n".join(done.stdout.splitlines()[-15:])
        raise InputError(
            f"converting {checkpoint}'s optimizer state failed; the checkpoint is as it was. DeepSpeed's words:\n{last}"
        )
    part.rename(target)


def _named(with_deepspeed: bool, stage: int) -> str:
    if not with_deepspeed:
        return "without DeepSpeed"
    return f"with DeepSpeed's {'ZeRO-3' if stage == 3 else 'ZeRO-1 or ZeRO-2' if stage else 'optimizer whole on each rank (stage 0)'}"


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group, all but its parameters and the learning rate, which is the schedule's."""
    return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]


def mend(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], rates: list[float]) -> None:
    """What DeepSpeed's ZeRO-3 gets wrong as it loads a universal checkpoint (0.19): every group has the first one's hyperparameters, and all
    parameters count their steps in one tensor, which each of them then increments.

    Args:
        optimizer: the one that DeepSpeed wraps.
        groups: `hyperparameters` before loading.
        rates: each group's learning rate now.
    """
    for group, kept, rate in zip(optimizer.param_groups, groups, rates, strict=True):
        group.update(kept, lr=rate)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def forget(work_dir: Path) -> None:
    """Remove what was converted; it has been loaded. A kill leaves none that looks whole."""
    for target in (work_dir / RESHARDED).glob("checkpoint-*"):
        if target.is_dir() and target.suffix != ".part":
            target.rename(target.with_name(f"{target.name}.0.part"))
    shutil.rmtree(work_dir / RESHARDED, ignore_errors=True)
