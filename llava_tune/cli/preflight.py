"""llava-tune preflight CFG [--launcher slurm]"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llava_tune.cli.options import FlatRun, parse
from llava_tune.errors import EXIT_RUN_FAILED

if TYPE_CHECKING:
    from llava_tune.cluster.preflight import Seen

DESCRIPTION = (
    "Look at every node before training, with the processes that will train: GPU, versions, prepared data and images readable, disk and "
    "/dev/shm, clock, speed of computing and of messages. Names a bad node, and ends with 1; in a minute, not in an hour."
)


@dataclass
class Options:
    run: FlatRun
    launcher: Literal["none", "torchrun", "slurm"] = "none"
    """Who started this process. NPROC_PER_NODE=N starts N through torchrun by itself."""
    patience: float = 60.0
    """Seconds to wait for a rank."""


def main(arguments: list[str]) -> None:
    """Look, put together, print."""
    config, options = parse(Options, arguments, "preflight", DESCRIPTION)
    from llava_tune.train.launch import processes_to_start, relaunch_under_torchrun, set_rank_variables

    if options.launcher == "none" and processes_to_start():
        relaunch_under_torchrun(["preflight", *arguments])
    set_rank_variables(options.launcher, False)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from llava_tune.cluster import preflight

    work_dir = Path(options.run.work_dir or Path("work_dirs") / Path(config).stem)
    seen = preflight.look(options.run, work_dir)

    def judge(found: list[Seen], absent: list[int]) -> bool:
        good = not preflight.verdict(found, absent)[0]
        if not good:
            _print(found, absent)
        return good

    good = preflight.put_together(seen, options.patience, 1, judge)[2]
    if good:
        preflight.time_links(seen)
        good = preflight.put_together(seen, options.patience, 2, _print)[2]
    if not good:
        raise SystemExit(EXIT_RUN_FAILED)


def _print(found: list[Seen], absent: list[int]) -> bool:
    """The table and the verdict. Returns whether training may begin."""
    from rich.console import Console
    from rich.table import Table

    from llava_tune.cluster.preflight import GIB, verdict

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 130)
    table = Table(title="nodes")
    for name in ("node", "ranks", "device", "samples", "images", "disk free", "/dev/shm", "message to the next"):
        table.add_column(name, justify="left" if name in ("node", "device") else "right")
    for host in dict.fromkeys(s.host for s in found):
        here = [s for s in found if s.host == host]
        first = here[0]
        links = [16 / 1024 / s.link for s in here if s.link]  # GiB/s
        table.add_row(
            host,
            ", ".join(str(s.rank) for s in here),
            first.gpu or "CPU",
            f"{first.samples:,}",
            f"{sum(s.images for s in here):,}",
            f"{first.disk / GIB:,.1f} GiB",
            f"{first.shm / GIB:,.1f} GiB",
            f"{min(links):,.1f} GiB/s" if links else "",
        )
    console.print(table)
    errors, notes = verdict(found, absent)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if not errors:
        print("preflight: all ranks are ready", file=sys.stderr, flush=True)
    return not errors
