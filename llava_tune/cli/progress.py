"""A bar on a terminal, a line every ten seconds elsewhere; nothing for what is over in a moment."""

from __future__ import annotations

import sys
import time
from typing import Any


class Bar:
    """Shows how far a job has come, with the time that is left.

    Args:
        what: the job, "preparing" or "examining".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._began = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.what, total=None, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, total: float, text: str) -> None:
        """`done` of `total`, and a few words."""
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._last > 10:
            self._last = now
            share = done / max(total, 1)
            left = (now - self._began) * (1 - share) / share if share else 0
            print(f"{self.what}: {share:.0%}, {text}, about {left:,.0f} s left", file=sys.stderr, flush=True)
