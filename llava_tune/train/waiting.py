"""Work that one process does and the others wait for, on the file system: never inside a collective."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llava_tune.errors import EXIT_BAD_INPUT, InputError
from llava_tune.paths import write_whole


def patience_minutes() -> float:
    """Minutes without progress after which a waiting process gives up: LLAVA_TUNE_DATASET_TIMEOUT, else 60."""
    text = os.environ.get("LLAVA_TUNE_DATASET_TIMEOUT", "60")
    try:
        return float(text)
    except ValueError:
        raise InputError(f"LLAVA_TUNE_DATASET_TIMEOUT is {text!r}; expected a number of minutes") from None


def once(
    lock: Path,
    is_done: Callable[[], bool],
    work: Callable[[], None],
    progress: Callable[[], str],
    what: str,
    speak: bool,
) -> None:
    """Let one process of those that share `lock`'s folder do `work`; return when it is done.

    Whoever gets the lock works; if it dies, even by kill -9, the system frees the lock and a waiting process goes on
    where it was. Nodes without a shared folder each have a lock, so each has one process that works.

    Args:
        lock: file to lock; made if missing.
        is_done: has somebody finished?
        work: what to do; must be able to go on after a kill.
        progress: any text that changes while `work` gets on.
        what: named in messages.
        speak: print what is waited for (one rank does).

    Raises:
        TimeoutError: no progress for LLAVA_TUNE_DATASET_TIMEOUT minutes.
        SystemExit: 2, where another process found the input wrong, and said so.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    patience = patience_minutes() * 60
    failed = lock.with_suffix(".failed")
    seen, since, said = progress(), time.monotonic(), 0.0
    with lock.open("a") as file:
        while not is_done():
            if failed.exists() and failed.read_text() == _launch():
                raise SystemExit(EXIT_BAD_INPUT)  # the process that worked has said why
            if _try_lock(file.fileno()):
                if not is_done():
                    try:
                        work()
                    except InputError:
                        write_whole(failed, _launch())  # the others would only find the same
                        raise
                fcntl.flock(file, fcntl.LOCK_UN)
                return
            now = progress()
            if now != seen:
                seen, since = now, time.monotonic()
            waited = time.monotonic() - since
            if waited > patience:
                raise TimeoutError(
                    f"{what}: no progress for {patience / 60:g} minutes (LLAVA_TUNE_DATASET_TIMEOUT), last seen: "
                    f"{seen or 'nothing'}. The process that holds {lock} may hang; its log says more"
                )
            if speak and time.monotonic() - said > 10:
                said = time.monotonic()
                print(f"waiting for {what}: {seen or 'starting'}", file=sys.stderr, flush=True)
            time.sleep(0.2)


def _launch() -> str:
    """What the processes that were started together have in common, and no others."""
    env = os.environ
    if "SLURM_PROCID" in env:
        return "-".join(env.get(f"SLURM_{part}", "0") for part in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return f"{env.get('TORCHELASTIC_RUN_ID', '')}-{os.getppid()}"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
