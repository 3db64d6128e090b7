"""llava-tune pretrain CFG [--deepspeed NAME|FILE] [--launcher none|torchrun|slurm] [--resume [DIR]]"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava_tune.cli.options import FlatRun, parse
from llava_tune.config.shipped import deepspeed_config
from llava_tune.errors import EXIT_REQUEUE, STOPPED_EXIT

DESCRIPTION = "Train the projector between a vision tower and a language model (stage 1)."


@dataclass
class Options:
    run: FlatRun
    deepspeed: str | None = None
    """A preset (deepspeed_zero1, deepspeed_zero2, deepspeed_zero2_offload, deepspeed_zero3, deepspeed_zero3_offload) or a
    JSON file."""
    launcher: Literal["none", "torchrun", "slurm"] = "none"
    """Who started this process. NPROC_PER_NODE=N starts N through torchrun by itself."""
    resume: str | None = None
    """Go on from a checkpoint: a folder, or 'latest' (also a bare --resume), which begins anew if there is none."""


def main(arguments: list[str], verb: str = "pretrain", description: str = DESCRIPTION) -> None:
    """Train; `finetune` is the same with another name."""
    config, options = parse(Options, _with_bare_resume(arguments), verb, description)
    deepspeed = deepspeed_config(options.deepspeed) if options.deepspeed else None
    from llava_tune.train import accumulation_steps, get_ready, train
    from llava_tune.train.launch import processes_to_start, relaunch_under_torchrun, was_restarted

    if options.launcher == "none" and (processes := processes_to_start()):
        # Before there are ranks: what is wrong is said once, and none of them has to wait.
        accumulation_steps(options.run, processes)
        get_ready(options.run)
        relaunch_under_torchrun([verb, *arguments])

    run = options.run
    work_dir = run.work_dir or str(Path("work_dirs") / Path(config).stem)
    run = dataclasses.replace(run, work_dir=work_dir)
    resume = "latest" if was_restarted() else options.resume
    trained = train(run, deepspeed=deepspeed, launcher=options.launcher, resume=resume)
    if trained.stopped:
        print(f"stopped for a signal after saving {trained.checkpoint}; --resume goes on", file=sys.stderr, flush=True)
        sys.stdout.flush()
        raise SystemExit(int(os.environ.get(STOPPED_EXIT, EXIT_REQUEUE)))


def _with_bare_resume(arguments: list[str]) -> list[str]:
    """A --resume without a value means the latest checkpoint."""
    result = []
    for i, argument in enumerate(arguments):
        result.append(argument)
        if argument == "--resume" and (i + 1 == len(arguments) or arguments[i + 1].startswith("--")):
            result.append("latest")
    return result
