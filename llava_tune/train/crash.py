"""What a run leaves behind when it ends badly: enough to say why, from every rank."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from llava_tune.config import Run, to_json
from llava_tune.constants import CRASH
from llava_tune.paths import write_whole

_PACKAGES = (
    "llava-tune",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "open_clip_torch",
    "datasets",
    "numpy",
)


def versions() -> dict[str, str]:
    """Of what a run stands on; packages that aren't installed are not named."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@contextlib.contextmanager
def crash_bundle(run: Run, work_dir: Path, rank: int, ids: Callable[[], list[str]]) -> Iterator[IO[str]]:
    """While the block runs: a rank that fails writes crash/rank-N.json, and one that is told to end writes its stacks.

    crash/rank-N.json holds the error with its traceback, the record ids of the batch, the last lines of metrics.jsonl, the config,
    versions, host and time. crash/rank-N.stack holds the stack of every thread, written at a SIGTERM: that of a rank that waited
    in vain for one that failed; one that was killed leaves a stack file without stacks (`cluster/failure.py` reads all this). Both go
    when the run ends well.

    Args:
        ids: gives the ids of the records that are being worked on.

    Yields:
        the open stack file, for `Heartbeat`.
    """
    folder = work_dir / CRASH
    folder.mkdir(parents=True, exist_ok=True)
    stack, report = folder / f"rank-{rank:05d}.stack", folder / f"rank-{rank:05d}.json"
    report.unlink(missing_ok=True)
    with stack.open("w") as file:
        file.write(
            f"rank {rank} on {socket.gethostname()}, process {os.getpid()}\n"
        )  # alone in the file of one that was killed
        file.flush()
        faulthandler.register(signal.SIGTERM, file=file, all_threads=True, chain=True)
        try:
            yield file
        except Exception as error:
            faulthandler.dump_traceback(file, all_threads=True)
            with contextlib.suppress(OSError):  # the error itself must come through, on a full disk too
                write_whole(report, json.dumps(_facts(run, work_dir, rank, ids(), error), indent=1, ensure_ascii=False))
            raise
        finally:
            faulthandler.unregister(signal.SIGTERM)
    stack.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another rank's are still there
        folder.rmdir()


def _facts(run: Run, work_dir: Path, rank: int, ids: list[str], error: Exception) -> dict[str, Any]:
    metrics = work_dir / "metrics.jsonl"
    last = metrics.read_text().splitlines()[-50:] if metrics.is_file() else []
    return {
        "error": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exception(error),
        "rank": rank,
        "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "ids": ids,
        "last_metrics": [json.loads(line) for line in last],
        "config": json.loads(to_json(run)),
        "versions": versions(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "CUDA_", "SLURM_", "OMP_"))},
        "disk_free": shutil.disk_usage(work_dir).free,
    }
