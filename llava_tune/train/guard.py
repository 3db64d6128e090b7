"""A loss that is no number, or jumps: the rule by which a run stops or leaves a global batch out, and whose records they were."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch

from llava_tune.config import Training
from llava_tune.errors import SharedRunFailed

WINDOW = 64
"""Accepted losses that a spike is measured against."""
_FEWEST = 16
_IN_A_ROW = 5


class Guard:
    """Judges each global batch before it changes a weight; every rank comes to the same judgement.

    A global batch is bad if its loss or its gradient's norm is not a finite number, or (with `spike_factor`) if its loss is more
    than spike_factor times the median of the last 64 losses, once there are 16. `bad_step="stop"` ends the run; "skip" gives the
    batch no update, and ends the run at the fifth such batch in a row. Both write the batch's record ids to skipped.jsonl.

    Args:
        losses: of the run so far, oldest first.
    """

    def __init__(self, training: Training, work_dir: Path, rank: int, losses: list[float]) -> None:
        self.rule, self.factor, self.rank = training.bad_step, training.spike_factor, rank
        self.path = work_dir / "skipped.jsonl"
        self.losses = deque((x for x in losses if math.isfinite(x)), maxlen=WINDOW)
        self.skipping = False
        self._in_a_row = 0

    def judge_loss(self, step: int, loss: float, ids: list[str]) -> None:
        """Before the backward pass of a global batch's last micro batch. Sets `skipping`.

        Args:
            step: optimizer steps done.
            loss: of the global batch, over all ranks.
            ids: of this rank's records.

        Raises:
            SharedRunFailed: the batch is bad, and the rule is to stop.
        """
        self.skipping = False
        if not math.isfinite(loss):
            self._bad(step, f"the loss is {loss}", ids)
        elif self.factor and len(self.losses) >= _FEWEST and loss > self.factor * statistics.median(self.losses):
            middle = statistics.median(self.losses)
            self._bad(step, f"the loss {loss:.4g} is {loss / middle:.1f} times the median of the last ones", ids)
        else:
            self.losses.append(loss)

    def judge_norm(self, step: int, norm: float, ids: list[str], applied: bool) -> None:
        """After the backward pass.

        Args:
            applied: the optimizer has made its step already (DeepSpeed does, within the backward pass, if it doesn't look at the norm).

        Raises:
            SharedRunFailed: see `judge_loss`.
        """
        if math.isfinite(norm):
            self._in_a_row = self._in_a_row if self.skipping else 0
        elif not self.skipping:
            self._bad(step, f"the gradient's norm is {norm}", ids, applied)

    def _bad(self, step: int, reason: str, ids: list[str], applied: bool = False) -> None:
        everyone = [ids]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everyone = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(everyone, ids)
        whose = [identity for some in everyone for identity in some]
        self._in_a_row += 1
        stop = applied or self.rule == "stop" or self._in_a_row >= _IN_A_ROW
        if self.rank == 0:
            entry = {"step": step + 1, "reason": reason, "rule": "stop" if stop else "skip", "ids": whose}
            with self.path.open("a") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if not stop:
            self.skipping = True
            return
        state = "The weights in memory are spoilt, no checkpoint is" if applied else "No weight was changed by it"
        often = f" for the {_IN_A_ROW}th time in a row" if self.rule == "skip" and self._in_a_row >= _IN_A_ROW else ""
        raise SharedRunFailed(
            f"step {step + 1}: {reason}{often}. The batch's records: {', '.join(whose[:8])}{' ...' if len(whose) > 8 else ''}; all "
            f"{len(whose)} are listed in {self.path}. {state}. Look at the records, lower the learning rate, or set "
            "training.bad_step='skip'; then --resume"
        )


def read_losses(history: list[dict[str, Any]]) -> list[float]:
    """The losses in the Trainer's history."""
    return [float(row["loss"]) for row in history if row.get("loss") is not None]
