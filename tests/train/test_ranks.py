"""Runs on several processes: torchrun, DeepSpeed, ranks that differ in what they hold, and ranks that wait."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_tune.config import load_run
from llava_tune.model.memory import training_memory
from llava_tune.train.telemetry import read_metrics
from tests.conftest import TORCHRUN, Finished, Small, losses, wrong_input
from tests.train.conftest import STEPS, close, offline

pytestmark = pytest.mark.timeout(400)


def test_two_processes_through_nproc_per_node(
    small: Small, store: Path, cli: Callable[..., Finished], reference: tuple[Path, list[float]], tmp_path: Path
) -> None:
    arguments = ("pretrain", small.config, "--work-dir", tmp_path / "two", *offline(store), *STEPS)
    done = cli(*arguments, env={"NPROC_PER_NODE": "2"})
    assert done.code == 0, done.err
    close(losses(tmp_path / "two"), reference[1], 1e-4)


COUNTS = """import json, os, torch
from transformers import TrainerCallback
from llava_tune.train import session

plain = session._trainer

class Count(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        optimizer = self.trainer.model_wrapped.optimizer
        known = set()
        def size(tensors):
            storages = [t.untyped_storage() for t in tensors if torch.is_tensor(t)]
            new = {{s.data_ptr(): s.nbytes() for s in storages if s.nbytes() and s.data_ptr() not in known}}
            known.update(new)
            return sum(new.values())
        weights = size([getattr(p, "ds_tensor", p.data) for p in model.parameters()])
        moments = size([v for s in optimizer.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()])
        copies = [c for n in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat") for c in getattr(optimizer, n, [])]
        found = {{"weights": weights, "optimizer": moments + size(copies)}}
        with open("{folder}/bytes-" + os.environ["RANK"] + ".json", "w") as file:
            json.dump(found, file)

def _trainer(*args, **kwargs):
    trainer = plain(*args, **kwargs)
    count = Count()
    count.trainer = trainer
    trainer.add_callback(count)
    return trainer

session._trainer = _trainer
from llava_tune.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_on_two_processes(
    small: Small,
    store: Path,
    two_ranks: Callable[..., Finished],
    reference: tuple[Path, list[float]],
    tmp_path: Path,
    stage: int,
) -> None:
    arguments = ["pretrain", small.config, "--deepspeed", f"deepspeed_zero{stage}", *offline(store), *STEPS]
    script = tmp_path / "counts.py"
    script.write_text(COUNTS.format(folder=str(tmp_path)))
    command = [*TORCHRUN, script, *arguments, "--launcher", "torchrun", "--work-dir", tmp_path / "ds"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    counting = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)
    assert counting.returncode == 0, counting.stderr
    for rank in range(2):  # what each rank holds is what `plan` says, to the byte
        counted = json.loads((tmp_path / f"bytes-{rank}.json").read_text())
        plan = training_memory(
            load_run(small.config).model, ranks=2, zero_stage=stage, offload_optimizer=False, bf16=False, rows=2, length=64,
            images=2, checkpointing=False,
        )  # fmt: skip
        assert (counted["weights"], counted["optimizer"]) == (plan.weights, plan.optimizer)
    close(losses(tmp_path / "ds"), reference[1], 1e-4)
    check_weights(tmp_path / "ds/checkpoint-20", reference[0] / "checkpoint-20")
    norms = [
        [r["grad_norm_projector"] for r in read_metrics(w / "metrics.jsonl")] for w in (tmp_path / "ds", reference[0])
    ]
    close(*norms, 1e-3)
    if stage == 1:  # resumes through the same code as stage 2
        return
    resume = tmp_path / "ds/checkpoint-10"
    done = two_ranks(*arguments, "--work-dir", tmp_path / "again", "--resume", resume)
    assert done.code == 0, done.err
    close(losses(tmp_path / "again"), losses(tmp_path / "ds")[10:], 1e-6)


def check_weights(found: Path, expected: Path) -> None:
    """The checkpoints hold the same weights, whole."""
    import torch
    from safetensors.torch import load_file

    a, b = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


@pytest.mark.slow
def test_deepspeed_in_one_process(
    small: Small, store: Path, cli: Callable[..., Finished], reference: tuple[Path, list[float]], tmp_path: Path
) -> None:
    done = cli(
        "pretrain",
        small.config,
        "--work-dir",
        tmp_path / "ds",
        "--deepspeed",
        "deepspeed_zero2",
        *offline(store),
        *STEPS,
    )
    assert done.code == 0, done.err
    close(losses(tmp_path / "ds"), reference[1], 1e-4)


def mixed_data(small: Small, path: Path) -> Path:
    """Every other record is text only."""
    records = json.loads(small.captions.read_text())[:16]
    for record in records[::2]:
        del record["image"]
        record["conversations"][0]["value"] = "Describe nothing."
    path.write_text(json.dumps(records))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [(), ("--deepspeed", "deepspeed_zero2"), ("--deepspeed", "deepspeed_zero3")])
def test_ranks_with_images_and_ranks_with_text_only(
    small: Small,
    cli: Callable[..., Finished],
    two_ranks: Callable[..., Finished],
    tmp_path: Path,
    deepspeed: tuple[str, ...],
) -> None:
    data = mixed_data(small, tmp_path / "mixed.json")
    arguments = ["pretrain", small.config, "--dataset.data-path", data, "--training.global-batch-size", "2"]
    arguments += ["--training.micro-batch-size", "1", "--training.max-steps", "8"]
    # Three questions for two ranks, with an image and without, while training: no rank may wait for another in vain.
    (tmp_path / "q.json").write_text(json.dumps(json.loads(data.read_text())[:3]))
    arguments += ["--evaluation.every-steps", "5", "--evaluation.data-path", tmp_path / "q.json"]
    arguments += ["--evaluation.max-new-tokens", "4", "--evaluation.batch-size", "1"]
    one = cli(*arguments, "--work-dir", tmp_path / "one")
    assert one.code == 0, one.err
    two = two_ranks(*arguments, "--work-dir", tmp_path / "two", *deepspeed, timeout=120)
    assert two.code == 0, two.err
    close(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-4)
    scores = [json.loads(line) for line in (tmp_path / "two/evaluation.jsonl").read_text().splitlines()]
    assert [(row["step"], row["questions"]) for row in scores] == [(5, 3), (8, 3)]
    best = json.loads((tmp_path / "two/best.json").read_text())
    assert best["checkpoint"] == "checkpoint-5" and (tmp_path / "two/checkpoint-5").is_dir()


def test_ranks_wait_on_the_file_system_longer_than_a_collective_may_take(small: Small, tmp_path: Path) -> None:
    """Rank 0 prepares for longer than the collective time-out; the other lives, and training starts."""
    script = tmp_path / "slow_main.py"
    script.write_text(SLOW_MAIN)
    env = {
        "LLAVA_TUNE_COLLECTIVE_TIMEOUT": "5",
        "LLAVA_TUNE_DATASET_TIMEOUT": "0.1",
        "LLAVA_TUNE_CACHE": str(tmp_path / "cache"),
    }
    run = ("pretrain", small.config, "--work-dir", tmp_path / "w", "--training.max-steps", "2")
    done = torchrun(*run, "--launcher", "torchrun", env=env, program=(str(script),))
    assert done.code == 0, done.err
    assert done.err.count("prepared 48 samples in") == 1
    seconds = float(done.err.split("prepared 48 samples in ")[1].split(" s")[0])
    assert seconds > 10  # twice the collective's time-out
    assert len(losses(tmp_path / "w")) == 2


def torchrun(
    *arguments: object, env: dict[str, str], program: tuple[str, ...] = ("-m", "llava_tune.cli.main")
) -> Finished:
    """Two processes that torchrun starts, so that no process prepares before there are ranks."""
    command = [*TORCHRUN, *program]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: v for k, v in env.items() if k != "NPROC_PER_NODE"}}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=env, timeout=300)
    return Finished(done.returncode, done.stdout, done.stderr)


SLOW_MAIN = """
import time
import llava_tune.train.data as data
from llava_tune.cli.main import main

real = data.prepare_plan

def slow(plan, folder, report):
    folder.parent.mkdir(parents=True, exist_ok=True)
    for k in range(12):  # progress each second: the waiting rank must not give up
        folder.with_suffix(".progress").write_text(f"{k} %")
        time.sleep(1)
    return real(plan, folder, report=report)

data.prepare_plan = slow
main()
"""


def test_wrong_data_is_said_once_whatever_the_ranks(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    text = small.captions.read_text()
    (tmp_path / "half.json").write_text(text[: len(text) // 2])
    run = ("pretrain", small.config, "--work-dir", tmp_path / "w", "--dataset.data-path", tmp_path / "half.json")
    env = {"NPROC_PER_NODE": "2", "LLAVA_TUNE_CACHE": str(tmp_path / "cache")}
    assert "the JSON array is not closed" in wrong_input(cli(*run, env=env))
    started_by_others = torchrun(*run, "--launcher", "torchrun", env=env)
    assert started_by_others.code != 0
    assert started_by_others.err.count("the JSON array is not closed") == 1, started_by_others.err


def test_a_waiting_process_gives_up_without_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from llava_tune.train.waiting import once

    monkeypatch.setenv("LLAVA_TUNE_DATASET_TIMEOUT", "0.01")
    lock = tmp_path / "x.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"the data: no progress for 0\.01 minutes"):
            once(lock, lambda: False, lambda: pytest.fail("not ours to do"), lambda: "37%", "the data", False)
    assert time.monotonic() - started < 5
