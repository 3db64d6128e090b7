"""A prepared store, and a run of one process that others are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished, Small, losses

STEPS = ("--training.max-steps", "20", "--training.save-steps", "10")


@pytest.fixture(scope="session")
def store(small: Small, cli: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "store"
    done = cli("prepare", small.config, "--save-folder", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def reference(
    small: Small, store: Path, cli: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[float]]:
    """20 steps in one process, from the prepared store; its work dir and losses."""
    work_dir = tmp_path_factory.mktemp("reference") / "run"
    done = cli("pretrain", small.config, "--work-dir", work_dir, *offline(store), *STEPS)
    assert done.code == 0, done.err
    found = losses(work_dir)
    assert len(found) == 20
    assert found[-1] < found[0]
    return work_dir, found


def offline(store: Path) -> tuple[str, ...]:
    return ("--dataset.offline-processed-text-folder", str(store))


def close(found: list[float], expected: list[float], relative: float) -> None:
    assert len(found) == len(expected)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert worst <= relative, (worst, found, expected)
