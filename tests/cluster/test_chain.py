"""The chain of jobs on a real two-node Slurm, with the commands of the docs: run, told to stop, killed, cancelled, submitted again."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava_tune.train.checkpoint import verify
from tests.conftest import REPOSITORY, Finished, Small, losses, wrong_input

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("slurm")]

SITE = """prepare_cpus = 1
cpus_per_task = 1
time = "10"
sbatch = ["--overcommit"]
srun = ["--overcommit"]
env = {{OMP_NUM_THREADS = "1", PYTHONPATH = "{repository}", LLAVA_TUNE_CACHE = "{cache}"}}
"""


@dataclass(frozen=True)
class Cluster:
    """`llava-tune slurm` with this test's site file."""

    folder: Path
    cli: Callable[..., Finished]

    def slurm(self, *arguments: object, expect: int = 0) -> Finished:
        env = {"LLAVA_TUNE_SLURM_CONFIG": str(self.folder / "slurm.toml")}
        done = self.cli("slurm", *arguments, "--nodes", 2, "--gpus-per-node", 0, env=env)
        assert done.code == expect, (done.out, done.err)
        return done


@pytest.fixture
def cluster(slurm: None, cli: Callable[..., Finished], tmp_path: Path) -> Cluster:
    cache = os.environ["LLAVA_TUNE_CACHE"]
    (tmp_path / "slurm.toml").write_text(SITE.format(repository=REPOSITORY, cache=cache))
    return Cluster(tmp_path, cli)


def job_of(work_dir: Path, stage: str) -> str:
    return str(json.loads((work_dir / "slurm/chain.json").read_text())[stage])


def state(job: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return re.findall(r"JobState=(\w+)", shown)[-1]


def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def steps_logged(work_dir: Path) -> int:
    path = work_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def close(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected)
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) < 1e-4


def test_prepare_train_evaluate_with_the_losses_of_one_node(
    cluster: Cluster, small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    one = cli("finetune", small.config, "--work-dir", tmp_path / "one")
    assert one.code == 0, one.err
    work_dir = tmp_path / "two"
    command = [small.config, "--work-dir", work_dir, "--deepspeed", "deepspeed_zero2", "--evaluation.data-path"]
    command += [small.folder / "data/test.json", "--evaluation.max-new-tokens", 4, "--export"]
    done = cluster.slurm(*command, "--watch")
    close(losses(work_dir), losses(tmp_path / "one"))
    assert "preflight: all ranks are ready" in done.out
    assert len(list((work_dir / "slurm").glob("prepare-*.log"))) == 4
    assert len((work_dir / "evaluation/answers.jsonl").read_text().splitlines()) == 36
    # Submitted again: all is found done, nothing queued.
    again = cluster.slurm(*command)
    assert [line.split(": ")[1] for line in again.out.splitlines()] == ["done already"] * 3
    # With another config it is not this run's end that lies there.
    changed = cluster.slurm(*command, "--optimizer.learning-rate", "2e-3", "--dry-run")
    assert "# train: done already" not in changed.out and "# prepare: done already" in changed.out


RUNS = int(os.environ.get("LLAVA_TUNE_CHAOS", "1"))


@pytest.mark.parametrize("run", range(RUNS))
def test_told_to_stop_killed_and_cancelled_it_ends_with_the_curve_of_an_undisturbed_run(
    cluster: Cluster, small: Small, cli: Callable[..., Finished], tmp_path: Path, run: int
) -> None:
    rng = random.Random(run)
    steps = ["--training.max-steps", 240, "--training.save-steps", 30]
    work_dir = tmp_path / "chain"
    command = [small.config, "--work-dir", work_dir, *steps, "--export"]
    assert cli("finetune", small.config, "--work-dir", tmp_path / "one", *steps).code == 0
    cluster.slurm(*command)
    job = job_of(work_dir, "train")

    # The signal that comes before the time limit: it saves, queues itself again, and goes on.
    until(lambda: steps_logged(work_dir) > rng.randrange(10, 50), 120, "the first steps")
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    log = work_dir / "slurm/train.log"
    until(lambda: "saved; queued again" in log.read_text(), 120, "the job to queue itself again")
    assert "first error" not in log.read_text()
    before = steps_logged(work_dir)
    until(lambda: steps_logged(work_dir) > before + rng.randrange(5, 40), 120, "steps after the requeue")

    # kill -9 of one rank: the job ends within a minute, the first error last.
    victims = subprocess.run(["pgrep", "-f", f"finetune {work_dir}/slurm/run.json"], capture_output=True, text=True)
    ranks = [pid for pid in victims.stdout.split() if _rank(pid) is not None]
    victim = next(pid for pid in ranks if _rank(pid) == "1")
    killed = time.monotonic()
    os.kill(int(victim), 9)
    until(lambda: state(job) == "FAILED", 60, "the job to fail")
    assert time.monotonic() - killed < 60
    last = log.read_text().splitlines()[-1]
    assert last.startswith("first error: rank 1 on ") and "killed" in last

    # Submitted again, it is cancelled: nothing half-written, and it does not queue itself again.
    cluster.slurm(*command)
    job = job_of(work_dir, "train")
    before = steps_logged(work_dir)
    until(lambda: steps_logged(work_dir) > min(before + rng.randrange(5, 40), 230), 120, "steps after the kill")
    subprocess.run(["scancel", job], check=True)
    until(lambda: state(job) == "CANCELLED", 60, "the job to be cancelled")
    for checkpoint in work_dir.glob("checkpoint-*"):
        verify(checkpoint, hashes=True)
    time.sleep(1)
    assert state(job) == "CANCELLED"

    cluster.slurm(*command, "--watch")
    close(losses(work_dir), losses(tmp_path / "one"))


def _rank(pid: str) -> str | None:
    """Of a training process, not of the srun that started it."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        env = dict(e.split("=", 1) for e in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in e)
    except (OSError, ValueError):
        return None
    return env.get("SLURM_PROCID") if name.startswith("python") or name == "llava-tune" else None


def test_a_failed_job_queues_itself_again_as_often_as_told(cluster: Cluster, small: Small, tmp_path: Path) -> None:
    work_dir = tmp_path / "run"
    steps = ["--training.max-steps", 120, "--training.save-steps", 20]
    cluster.slurm(small.config, "--work-dir", work_dir, *steps, "--export", "--retries", 1)
    job = job_of(work_dir, "train")
    until(lambda: steps_logged(work_dir) > 30, 120, "the first steps")
    victims = subprocess.run(["pgrep", "-f", f"finetune {work_dir}/slurm/run.json"], capture_output=True, text=True)
    os.kill(next(int(pid) for pid in victims.stdout.split() if _rank(pid) == "0"), 9)
    until(lambda: state(job) == "COMPLETED", 180, "the run to end")
    assert "failed; queued again" in (work_dir / "slurm/train.log").read_text()
    assert len(losses(work_dir)) == 120


def test_a_node_without_the_images_is_named_before_training(cluster: Cluster, small: Small, tmp_path: Path) -> None:
    (tmp_path / "node1").symlink_to(small.images)
    config = tmp_path / "c.py"
    config.write_text(
        "import dataclasses\nfrom llava_tune.config import load_run, with_fields\n"
        f"run = with_fields(load_run({str(small.config)!r}), {{'dataset.image_folder': {str(tmp_path / 'here')!r}}})\n"
    )
    (tmp_path / "here").symlink_to(small.images)
    work_dir = tmp_path / "run"
    cluster.slurm(config, "--work-dir", work_dir, "--export", "--dry-run")
    # Each node looks at its own folder, as if the disks were its own; node2 has none.
    script = work_dir / "slurm/train.sbatch"
    ours = f"{sys.executable} -m llava_tune.cli.main preflight"
    text = script.read_text()
    assert text.count(ours) == 1
    inner = f"bash -c 'exec {ours} \"$@\" --dataset.image-folder {tmp_path}/$SLURMD_NODENAME' preflight"
    script.write_text(text.replace(ours, inner))
    subprocess.run(["sbatch", "--wait", work_dir / "slurm/prepare.sbatch"], check=True, capture_output=True)
    done = subprocess.run(["sbatch", "--wait", script], capture_output=True, text=True)
    assert done.returncode != 0
    log = (work_dir / "slurm/train.log").read_text()
    assert re.search(rf"error: rank 1 on node2: dataset.image_folder {tmp_path}/node2: no such folder", log), log
    assert "rank 0 on node1" not in log and not list(work_dir.glob("metrics.jsonl"))


def test_what_would_fail_in_the_queue_is_refused_here(
    small: Small, cli: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["slurm", small.config, "--work-dir", tmp_path / "w", "--nodes", 2, "--dry-run"]
    assert "global_batch_size 4 is not a multiple of 16" in wrong_input(cli(*base))
    site = {"LLAVA_TUNE_SLURM_CONFIG": str(tmp_path / "slurm.toml")}
    (tmp_path / "slurm.toml").write_text('partitoin = "gpu"')
    message = wrong_input(cli(*base, "--gpus-per-node", 1, env=site))
    assert "partitoin" in message and "partition" in message
    (tmp_path / "slurm.toml").write_text(
        'partition = "gpu"\nmodules = ["cuda/12.8"]\ncontainer = "apptainer exec --nv x.sif"'
    )
    shown = cli(*base, "--gpus-per-node", 1, "--stage", "/scratch", "--account", "me", env=site)
    assert shown.code == 0, shown.err
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account=me",
        "#SBATCH --gpus-per-node=1",
        "module load cuda/12.8",
    ):
        assert line in shown.out
    assert "apptainer exec --nv x.sif" in shown.out and "cp --archive --update" in shown.out
    for path in (tmp_path / "w/slurm").glob("*.sbatch"):
        subprocess.run(["bash", "-n", path], check=True)
    # A data set's own image folder goes before the one that is staged: it would be read from where it lay.
    several = tmp_path / "several.py"
    several.write_text(
        "import dataclasses\nfrom llava_tune.config import DataSource, load_run\n"
        f"run = load_run({str(small.config)!r})\n"
        f"source = DataSource(data_path={str(small.captions)!r}, image_folder={str(small.images)!r})\n"
        "run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, data_path=None, sources=(source,)))\n"
    )
    command = ["slurm", several, "--work-dir", tmp_path / "v", "--nodes", 2, "--gpus-per-node", 1, "--dry-run"]
    assert "has a folder of its own" in wrong_input(cli(*command, "--stage", "/scratch", env=site))
    assert cli(*command, env=site).code == 0
