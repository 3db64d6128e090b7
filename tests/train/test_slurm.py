"""Training on a real two-node Slurm, started by the shared script."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished, Small, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500), pytest.mark.xdist_group("slurm")]


def srun(*arguments: object, nodes: int = 2) -> Finished:
    command = [
        "srun",
        f"-N{nodes}",
        "--ntasks-per-node=1",
        "--overcommit",
        sys.executable,
        "-m",
        "llava_tune.cli.main",
        *arguments,
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("deepspeed", [(), ("--deepspeed", "deepspeed_zero2")])
def test_two_nodes_have_the_losses_of_one(
    slurm: None, small: Small, cli: Callable[..., Finished], tmp_path: Path, deepspeed: tuple[str, ...]
) -> None:
    run = ("pretrain", small.config, "--training.max-steps", "6")
    one = cli(*run, "--work-dir", tmp_path / "one")
    assert one.code == 0, one.err
    two = srun(*run, "--work-dir", tmp_path / "two", "--launcher", "slurm", *deepspeed)
    assert two.code == 0, two.err
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == 6
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) < 1e-4


def test_an_impossible_batch_is_one_message_and_exit_code_2(slurm: None, small: Small, tmp_path: Path) -> None:
    run = ("pretrain", small.config, "--work-dir", tmp_path / "x", "--launcher", "slurm")
    unknown = srun(*run, "--training.micro-batch", "3")
    assert unknown.code == 2 and unknown.err.count("Unrecognized options: ") == 1, unknown.err
    done = srun(*run, "--training.global-batch-size", "3")
    assert done.code == 2
    messages = [line for line in done.err.splitlines() if "error" in line and "global_batch_size" in line]
    assert len(messages) == 1, done.err
    assert "is not a multiple of 2 rank(s) x training.micro_batch_size 2" in messages[0]
