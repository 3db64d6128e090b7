"""Worker processes that read parts of the sources."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TypeVar

from llava_tune.data.parts import Job, Task, build_worker, start_worker

R = TypeVar("R")

SMALL_BYTES = 4 << 20
"""Sources smaller than this are read in one process: starting others would take longer."""


def run_parallel(
    job: Job, tasks: Iterable[Task], num_proc: int, work: Callable[[Task], R], done: Callable[[Task, R], None]
) -> None:
    """Call `work` on each task in one of `num_proc` processes, and `done` here with what it gives, as they come.

    Raises:
        RuntimeError: a process was killed.
    """
    method = _start_method()
    if method == "fork":
        build_worker(job)
        gc.freeze()  # what is there now is never collected: its pages stay shared with the workers
    warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context(method), initializer=start_worker, initargs=(job,))
    waiting: dict[Future[R], Task] = {}

    def collect(most: int) -> None:
        while len(waiting) > most:
            ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                done(waiting.pop(future), future.result())

    try:
        for task in tasks:
            waiting[pool.submit(work, task)] = replace(task, span=task.span.without_text())
            collect(2 * num_proc)
        collect(0)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed (often: out of memory). The finished parts are kept; run the same command again, "
            "with a smaller --num-proc if it is memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_method() -> str:
    """How workers start: forked, so that they have the tokenizer at once and share its memory; but afresh where torch is loaded
    (training, with the threads and devices that it holds), or where a process can't be forked safely."""
    return "fork" if sys.platform == "linux" and "torch" not in sys.modules else "spawn"
