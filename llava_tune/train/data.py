"""The store that a run trains on: the prepared one, or one made now in the cache, through the same code."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from llava_tune.config import Run
from llava_tune.data.plan import Plan, check_plan, make_plan
from llava_tune.data.preparation import Progress, prepare_plan
from llava_tune.data.sources import open_sources
from llava_tune.data.splits import split_name
from llava_tune.data.store import MANIFEST, read_manifest
from llava_tune.paths import cache_folder, write_whole
from llava_tune.train.launch import rank
from llava_tune.train.waiting import once


def cached_store(plan: Plan) -> Path:
    """Where the cache keeps the store of a plan: the name is a hash of the settings and of the sources' identities.

    Raises:
        InputError: a source is missing or broken.
    """
    sets = []
    for planned in plan.sets:
        files = open_sources(planned.config.data_path, split_name(planned.config.split))
        known = [[str(file.path.resolve()), *file.identity()] for file in files]
        sets.append([planned.config.format, planned.convert_hash, planned.layout.template.name, known])
    key = [asdict(plan.spec), sets]
    return cache_folder() / "datasets" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]


def is_foreign(run: Run, folder: Path) -> bool:
    """Whether a folder is another program's, and the config says to take it."""
    return run.dataset.trust_processed_folder and folder.is_dir() and not (folder / MANIFEST).is_file()


def ready_store(run: Run) -> Path:
    """The folder of a store that fits the run; prepared first if there is none.

    Raises:
        InputError: the given store doesn't fit, or the data is wrong.
        TimeoutError: another process prepares it and makes no progress.
    """
    given = run.dataset.offline_processed_text_folder
    if given is not None and is_foreign(run, Path(given)):
        if rank() == 0:
            print(
                f"{given} has no manifest: its tokenizer, template and max_length are taken on trust", file=sys.stderr
            )
        return Path(given)
    plan = make_plan(run)
    if given is not None:
        check_plan(Path(given), read_manifest(Path(given)), plan)
        return Path(given)
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
            print(f"preparing {', '.join(s.name for s in plan.sets)}: {text}", file=sys.stderr, flush=True)

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
