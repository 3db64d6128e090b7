"""A run that is told to stop saves first: SIGTERM and SIGUSR1, as schedulers send them before a time limit or a preemption."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """After a signal, the step that runs is finished on all ranks, a checkpoint is written, and training ends.

    The ranks agree at the end of each step, so that it is enough if one of them got the signal.

    Attributes:
        stopped: training ended for a signal.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._received = False
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handler
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a data worker, which was forked with this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        received = torch.tensor([int(self._received)], device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        if int(received):
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
