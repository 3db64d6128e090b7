"""`prepare` on the two nodes of a real Slurm: as tasks of `srun`, and as an array job; killed, and gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_tune.data import store as stores
from tests.conftest import Small
from tests.data.test_prepare import TINY_PARTS, digest, many_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("slurm")]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def job(slurm: None, small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """The command without its folder, and the digest of the reference store."""
    folder = tmp_path_factory.mktemp("shards")
    data = many_records(small, folder / "many.json", 20_000)
    script = folder / "tiny_parts.py"
    script.write_text(TINY_PARTS)
    command = [
        sys.executable,
        str(script),
        "prepare",
        str(small.config),
        "--dataset.data-path",
        str(data),
        "--num-proc",
        "2",
    ]
    subprocess.run([*command, "--save-folder", str(folder / "reference")], check=True, capture_output=True)
    return command, digest(folder / "reference")


def test_tasks_of_srun_killed_and_run_again(job: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    command, reference = job
    run = ["srun", "-N2", "--ntasks-per-node=1", "--overcommit", *command, "--save-folder", str(tmp_path / "s")]
    process = subprocess.Popen(run, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "s").glob("data-*.arrow"))) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(["pkill", "-9", "-f", f"save-folder {tmp_path / 's'}"], check=False)
    process.wait(timeout=120)
    with pytest.raises(stores.InputError, match="has not finished"):
        stores.open_store(tmp_path / "s")
    written = len(list((tmp_path / "s").glob("data-*.arrow")))
    assert 10 <= written < len(reference) - 3
    done = subprocess.run(run, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "s") == reference
    assert "20,000 samples" in done.stdout


def test_an_array_of_four(job: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    command, reference = job
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n" + " ".join([*command, "--save-folder", str(tmp_path / "s")]) + "\n")
    submit = ["sbatch", "--wait", "--array=0-3", "--overcommit", f"--output={tmp_path}/%a.out", str(script)]
    done = subprocess.run(submit, env=ENV, capture_output=True, text=True, timeout=300)
    said = [(tmp_path / f"{k}.out").read_text() for k in range(4)]
    assert done.returncode == 0, (done.stderr, said)
    assert digest(tmp_path / "s") == reference
    assert sum("20,000 samples" in text for text in said) >= 1
    assert any("shard 1/4" in text or "20,000 samples" in text for text in said)
