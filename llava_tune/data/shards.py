"""Which parts of a store one of several machines writes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llava_tune.errors import InputError


@dataclass(frozen=True)
class Shard:
    """Number `index` (from 0) of `count` shards; parts are dealt to them in turn."""

    index: int = 0
    count: int = 1

    def has(self, part: int) -> bool:
        return part % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


def parse_shard(text: str) -> Shard:
    """`I/N`, I from 1 to N.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard {text}: expected I/N with I from 1 to N, as in 1/4 for the first of four")
    return Shard(int(match[1]) - 1, int(match[2]))


def slurm_shard(environ: Mapping[str, str] = os.environ) -> Shard:
    """The shard that Slurm's variables give: a task of a job array, a task of `srun`, or both; else the only one.

    See the variables in `man sbatch` (job arrays) and `man srun`.
    """
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environ:
        first = int(environ.get("SLURM_ARRAY_TASK_MIN", 0))
        step = int(environ.get("SLURM_ARRAY_TASK_STEP") or 1)
        last = int(environ.get("SLURM_ARRAY_TASK_MAX", environ["SLURM_ARRAY_TASK_ID"]))
        index = (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // step
        count = (last - first) // step + 1
    # A batch script itself is not a task of `srun`, though it sees the job's variables.
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks > 1 and "SLURM_PROCID" in environ:
        index, count = index * tasks + int(environ["SLURM_PROCID"]), count * tasks
    return Shard(index, count)
