"""llava-tune why WORK_DIR"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from llava_tune.errors import InputError


@dataclass
class Options:
    """Say why a run failed: the first error of all ranks, its rank and host; of a hang, where each rank was."""

    work_dir: tyro.conf.Positional[str]
    """The run's folder."""


def main(arguments: list[str]) -> None:
    """Print it, to standard error, as the last lines of a job's log."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune why", use_underscores=False)
    from llava_tune.cluster.failure import explain

    work_dir = Path(options.work_dir)
    if not work_dir.is_dir():
        raise InputError(f"{work_dir}: no such folder. Expected a run's work dir, such as work_dirs/NAME")
    print(explain(work_dir) or f"{work_dir}: no rank left an error", file=sys.stderr, flush=True)
