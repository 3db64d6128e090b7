"""Why a run failed: from what the ranks left; a hang is found; torchrun's restarts go on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_tune.cluster.failure import explain
from llava_tune.train.launch import own_device
from tests.conftest import TORCHRUN, Finished, Small, losses, wrong_input

STACK = """rank {rank} on {host}, process 7
{stacks}"""


def leave(work_dir: Path, rank: int, *, error: str | None = None, stacks: str = "", when: float = 0) -> None:
    folder = work_dir / "crash"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank:05d}.stack").write_text(STACK.format(rank=rank, host=f"node{rank}", stacks=stacks))
    if error is not None:
        facts = {"error": error, "traceback": ["Traceback\n", f"{error}\n"], "rank": rank, "host": f"node{rank}"}
        path = folder / f"rank-{rank:05d}.json"
        path.write_text(json.dumps(facts))
        os.utime(path, (when, when))


LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:31337"


def test_a_killed_rank_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    for rank in range(64):
        leave(tmp_path, rank, error=None if rank == 37 else LOST, when=rank)
    said = explain(tmp_path)
    assert said is not None
    assert said.splitlines()[-1].startswith("first error: rank 37 on node37: it ended without a word: killed")
    assert said.count("Traceback") == 0 and len(said) < 600  # not 63 tracebacks


def test_an_error_of_its_own_comes_before_what_it_caused(tmp_path: Path) -> None:
    leave(tmp_path, 0, error=LOST, when=1)
    leave(tmp_path, 1, error="ValueError: 3 image tokens in the batch", when=2)
    leave(tmp_path, 2, stacks="Current thread 0x1 (most recent call first):")
    said = str(explain(tmp_path))
    assert said.splitlines()[-1] == "first error: rank 1 on node1: ValueError: 3 image tokens in the batch"
    assert "Traceback" in said and "rank 0 failed after it; rank 2 were told to end" in said


def test_a_rank_that_was_told_to_end_is_no_cause(tmp_path: Path) -> None:
    leave(tmp_path, 0, stacks="Current thread 0x1 (most recent call first):")
    leave(tmp_path, 1, error=LOST, when=5)
    assert str(explain(tmp_path)).splitlines()[-1] == f"first error: rank 1 on node1: {LOST}"


def test_a_run_that_ended_well_has_nothing_to_say(cli: Callable[..., Finished], tmp_path: Path) -> None:
    assert explain(tmp_path) is None
    assert "no rank left an error" in cli("why", tmp_path).err
    assert "no such folder" in wrong_input(cli("why", tmp_path / "nowhere"))


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device(3, 8, 8) == 3
    with pytest.raises(ValueError, match="8 ranks on a node that shows 4 GPU"):
        own_device(0, 8, 4)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert own_device(3, 8, 1) == 0  # Slurm shows each task its own


def test_several_nodes_need_an_address(cli: Callable[..., Finished], small: Small, tmp_path: Path) -> None:
    run = ("pretrain", small.config, "--work-dir", tmp_path / "w")
    said = wrong_input(cli(*run, env={"NPROC_PER_NODE": "2", "NNODES": "2"}))
    assert "NNODES is 2, but ADDR is not set" in said and not (tmp_path / "w").exists()
    restarts = {"NPROC_PER_NODE": "2", "MAX_RESTARTS": "x"}
    assert "MAX_RESTARTS is 'x'; expected a number" in wrong_input(cli(*run, env=restarts))
    assert "NPROC_PER_NODE is 'gpu'" in wrong_input(cli(*run, env={"NPROC_PER_NODE": "gpu"}))


HANGS = """import os, time
from llava_tune.train import trainer
plain = trainer.LlavaTrainer.compute_loss
def compute_loss(self, *a, **k):
    if os.environ["RANK"] == "1" and self.state.global_step == 2:
        time.sleep(3600)
    return plain(self, *a, **k)
trainer.LlavaTrainer.compute_loss = compute_loss
from llava_tune.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_hang_is_found_and_the_rank_named(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    command = [*TORCHRUN, script, "pretrain"]
    command += [small.config, "--work-dir", tmp_path / "run", "--launcher", "torchrun", "--training.hang-timeout", "12"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, timeout=150)
    assert done.returncode == 1 and time.monotonic() - began < 140
    assert len(losses(tmp_path / "run")) == 2
    said = cli("why", tmp_path / "run").err
    assert "in compute_loss" not in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("first error: rank 1 on "), said
    assert "no step, score or checkpoint for 0:00:12" in said
    stack = (tmp_path / "run/crash/rank-00001.stack").read_text()
    assert "hangs.py" in stack and "in compute_loss" in stack


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_restarts_and_the_curve_is_that_of_an_undisturbed_run(
    small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    steps = ["--training.max-steps", "120", "--training.save-steps", "20"]
    assert cli("pretrain", small.config, "--work-dir", tmp_path / "one", *steps).code == 0
    work_dir = tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "llava_tune.cli.main",
        "pretrain",
        str(small.config),
        "--work-dir",
        str(work_dir),
        *steps,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "2", "MAX_RESTARTS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    metrics = work_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 35:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(_process_of_rank(str(work_dir), "1"), signal.SIGKILL)
    error = process.communicate(timeout=150)[1]
    assert process.returncode == 0, error
    assert f"resuming from {work_dir}/checkpoint-20" in error
    found, expected = losses(work_dir), losses(tmp_path / "one")
    assert len(found) == 120
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) < 1e-4


def _process_of_rank(mark: str, rank: str) -> int:
    found = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True).stdout.split()
    for pid in found:
        try:
            environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:
            continue
        if f"RANK={rank}" in environ and "LOCAL_RANK=1" in environ:
            return int(pid)
    raise AssertionError(f"no process of rank {rank} among {found}")
