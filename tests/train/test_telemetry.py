"""A rank that holds the others up is named once, with its host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llava_tune.data.order import BatchOrder
from llava_tune.train.telemetry import Telemetry


def test_slow_ranks_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = BatchOrder(
        np.full(8, 5, np.int32), seed=0, global_batch_size=4, micro_batch_size=1, group_by_length=True, world_size=4
    )
    telemetry = Telemetry(tmp_path, None, 0.0, 0, order, main=True)  # type: ignore[arg-type]
    telemetry._hosts = ["a", "b", "c", "d"]
    telemetry._name_slow_ranks([0.1, 0.1, 0.1, 0.2], [5.0, 5.1, 5.0, 5.2], 10.0)
    assert capsys.readouterr().err == ""
    for wait in (4.0, 5.0):  # the share differs, the rank is the same
        telemetry._name_slow_ranks([0.1, 0.1, wait, 0.1], [5.0, 9.0, 5.0, 5.0], 10.0)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: rank 1 on b is slow: its forward passes take 1.8 times the median rank's",
        "warning: rank 2 on c waits for data: 40% of the time, the others don't: look at its disk",
    ]
