"""A hang is found: a rank that makes no step for too long writes where each of its threads is, and ends."""

from __future__ import annotations

import faulthandler
from typing import IO, Any

from transformers import TrainerCallback


class Heartbeat(TrainerCallback):
    """Counts anew at each micro step, evaluation and checkpoint. The clock is faulthandler's own thread in C: it runs also while the
    interpreter is held by a library that waits for ever.

    Args:
        seconds: without a sign of life; 0: never.
        stacks: where the stacks go.
    """

    def __init__(self, seconds: float, stacks: IO[str]) -> None:
        self._seconds, self._stacks = seconds, stacks

    def beat(self, *_: Any, **__: Any) -> None:
        """A sign of life."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stacks)

    on_train_begin = on_step_begin = on_substep_end = on_step_end = on_save = on_log = beat

    def on_train_end(self, *_: Any, **__: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
