"""The store that a run trains on: the prepared one, or one made now in the cache, through the same code."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from llava_tune.config import Run
from llava_tune.data.prepare import Plan, Progress, make_plan, prepare_plan
from llava_tune.data.store import MANIFEST, check_source, check_spec, read_manifest
from llava_tune.errors import InputError
from llava_tune.paths import cache_folder, write_whole
from llava_tune.train.launch import rank
from llava_tune.train.waiting import once


def cached_store(plan: Plan) -> Path:
    """Where the cache keeps the store of a plan: the name is a hash of the settings and of the source's identity."""
    if plan.source is None:
        raise InputError("dataset.data_path is not set")
    if not plan.source.is_file():
        raise InputError(
            f"data_path {plan.source}: no such file. Expected a LLaVA JSON (one array of records) or JSONL file"
        )
    stat = plan.source.stat()
    key = [asdict(plan.spec), str(plan.source.resolve()), stat.st_size, stat.st_mtime_ns]
    return cache_folder() / "datasets" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]


def ready_store(run: Run) -> Path:
    """The folder of a store that fits the run; prepared first if there is none.

    Raises:
        InputError: the given store doesn't fit, or the data is wrong.
        TimeoutError: another process prepares it and makes no progress.
    """
    plan = make_plan(run)
    given = run.dataset.offline_processed_text_folder
    if given is not None:
        folder = Path(given)
        manifest = read_manifest(folder)
        check_spec(folder, manifest, plan.spec)
        if plan.source is not None:
            check_source(folder, manifest, plan.source)
        return folder
    folder = cached_store(plan)
    once(
        lock=folder.with_suffix(".lock"),
        is_done=(folder / MANIFEST).is_file,
        work=lambda: _prepare(plan, folder),
        progress=lambda: _progress(folder),
        what="the data to be prepared",
        speak=rank() == 0,
    )
    return folder


def _prepare(plan: Plan, folder: Path) -> None:
    started = time.monotonic()
    last = 0.0

    def report(progress: Progress) -> None:
        nonlocal last
        text = f"{progress.bytes / max(progress.total_bytes, 1):.0%}, {progress.samples:,} samples"
        write_whole(folder.with_suffix(".progress"), text)
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"preparing {plan.source}: {text}", file=sys.stderr, flush=True)

    done = prepare_plan(plan, folder, report=report)
    folder.with_suffix(".progress").unlink(missing_ok=True)
    seconds = time.monotonic() - started
    print(
        f"prepared {done.samples:,} samples in {seconds:.1f} s, {done.left_out:,} left out: {folder}",
        file=sys.stderr,
        flush=True,
    )


def _progress(folder: Path) -> str:
    try:
        return folder.with_suffix(".progress").read_text()
    except OSError:
        return ""
