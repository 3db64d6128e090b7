"""Checkpoints written while training goes on: what is in them, and what a slow or full disk does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_iter

from llava_tune.model.factory import RUN_CONFIG
from llava_tune.train.checkpoint import STAGING, clear_staging, rotate
from llava_tune.train.saving import Saver
from tests.conftest import Finished, Small, losses
from tests.train.conftest import offline

pytestmark = pytest.mark.timeout(300)

SLOW = """import sys, time, torch
from llava_tune.train import trainer
from llava_tune.cli.main import main

write = torch.save

def slow(content, path, *args, **kwargs):
    if str(path).endswith(("optimizer.pt", "optim_states.pt", "model_states.pt")):
        time.sleep(1.5)
    write(content, path, *args, **kwargs)

torch.save = slow
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", [None, "deepspeed_zero2", "deepspeed_zero3"])
def test_a_checkpoint_holds_its_own_step_however_late_it_is_written(
    small: Small, store: Path, cli: Callable[..., Finished], tmp_path: Path, preset: str | None
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    arguments = ["finetune", small.config, *offline(store), "--training.max-steps", "8", "--training.save-steps", "4"]
    arguments += ["--deepspeed", preset] if preset else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *arguments, "--work-dir", tmp_path / "slow"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    waiting = cli(*arguments, "--work-dir", tmp_path / "waiting", "--training.no-save-in-background")
    assert waiting.code == 0, waiting.err
    assert losses(tmp_path / "slow") == losses(tmp_path / "waiting")
    for name in ("checkpoint-4", "checkpoint-8"):
        found, expected = tmp_path / "slow" / name, tmp_path / "waiting" / name
        files = sorted(str(p.relative_to(expected)) for p in expected.rglob("*") if p.is_file())
        assert sorted(str(p.relative_to(found)) for p in found.rglob("*") if p.is_file()) == files
        a, b = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        states = [f for f in files if f.endswith(("optimizer.pt", "optim_states.pt", "model_states.pt"))]
        assert states
        for file in states:
            # Files of the test's own runs: DeepSpeed's hold its classes.
            mine, theirs = (tensors(torch.load(w / file, weights_only=False)) for w in (found, expected))
            assert len(mine) == len(theirs) > 0
            assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True)), file


def tensors(content: Any) -> list[torch.Tensor]:
    return [x for x in tree_iter(content) if isinstance(x, torch.Tensor)]


def test_a_disk_that_is_full_in_the_background_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 0, 1, 1, background=True)

    def full(content: object, path: Path) -> None:
        path.write_text("half of")
        raise OSError(28, "No space left on device")

    staged = saver.begin("checkpoint-1")
    saver.write(full, torch.ones(2), staged / "weights")
    saver.publish(lambda: None)
    time.sleep(0.2)  # time enough to give it its name all the same
    with pytest.raises(RuntimeError, match="the disk is full: checkpoint-1 could not be written"):
        saver.wait()
    assert not staged.exists() and not (tmp_path / "checkpoint-1").exists()


def test_a_checkpoint_has_its_name_only_when_every_rank_has_written(tmp_path: Path) -> None:
    ranks = [Saver(tmp_path, rank, 2, 2, background=True) for rank in range(2)]
    content = torch.ones(2)
    for saver in ranks:
        saver.begin("checkpoint-1")
    named: list[str] = []
    ranks[0].write(torch.save, content, tmp_path / ".saving/checkpoint-1/0.pt")
    ranks[0].publish(lambda: named.append("once"))
    content.fill_(5)
    time.sleep(0.3)  # time enough for a thread that doesn't wait for the other rank
    ranks[0].check()
    assert not (tmp_path / "checkpoint-1").exists()
    ranks[1].write(torch.save, content, tmp_path / ".saving/checkpoint-1/1.pt")
    ranks[1].publish(lambda: named.append("once"))
    for saver in ranks:
        saver.wait()
    assert named == ["once"]
    assert [torch.load(tmp_path / f"checkpoint-1/{r}.pt").tolist() for r in range(2)] == [[1, 1], [5, 5]]
    assert not list((tmp_path / ".saving").iterdir())


def test_too_little_memory_for_a_copy_means_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llava_tune.train.saving.available_memory", lambda: 100)
    saver = Saver(tmp_path, 0, 1, 1, background=True)
    written: list[torch.Tensor] = []
    content = torch.zeros(100)
    staged = saver.begin("checkpoint-1")
    for _ in range(2):
        saver.write(lambda found, path: written.append(found), content, staged / "x")
    assert written[0] is content
    assert capsys.readouterr().err.count("while training waits") == 1


def test_a_kill_while_old_checkpoints_go_leaves_each_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(steps: Iterable[int]) -> None:
        for step in steps:
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir(exist_ok=True)
            (folder / RUN_CONFIG).write_text("{}")

    def there() -> list[str]:
        return sorted(p.name for p in tmp_path.glob("checkpoint-*"))

    (tmp_path / STAGING).mkdir()
    made(range(1, 6))
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path: None)  # as if killed before a file is gone
        rotate(tmp_path, 2, tmp_path / "checkpoint-2")
    assert there() == ["checkpoint-2", "checkpoint-5"]
    clear_staging(tmp_path)
    made(range(1, 6))
    (tmp_path / STAGING).mkdir()
    rotate(tmp_path, 3, tmp_path / "checkpoint-5")
    assert there() == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    rotate(tmp_path, 1, None)
    assert there() == ["checkpoint-5"] and not list((tmp_path / STAGING).iterdir())
