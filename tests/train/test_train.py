"""Training as users start it: online and offline, resumed, killed, on several processes, under DeepSpeed."""

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

from llava_tune.config import Evaluation, load_run, with_fields
from llava_tune.model.memory import training_memory
from tests.conftest import TORCHRUN, Finished, Small, losses, wrong_input

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def store(small: Small, cli: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "store"
    done = cli("prepare", small.config, "--save-folder", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
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


STEPS = ("--training.max-steps", "20", "--training.save-steps", "10")


def offline(store: Path) -> tuple[str, ...]:
    return ("--dataset.offline-processed-text-folder", str(store))


def close(found: list[float], expected: list[float], relative: float) -> None:
    assert len(found) == len(expected)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert worst <= relative, (worst, found, expected)


def test_a_run_leaves_what_it_says(reference: tuple[Path, list[float]]) -> None:
    work_dir, _ = reference
    assert {p.name for p in work_dir.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-20"}
    assert (work_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list(work_dir.glob("tensorboard/**/events*"))
    row = json.loads((work_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 1
    assert row["tokens_per_second"] > row["supervised_tokens_per_second"] > 0
    assert not (work_dir / ".saving").exists() or not list((work_dir / ".saving").iterdir())


def test_online_equals_offline_bit_for_bit(
    small: Small, cli: Callable[..., Finished], reference: tuple[Path, list[float]], tmp_path: Path
) -> None:
    env = {"LLAVA_TUNE_CACHE": str(tmp_path / "cache")}
    done = cli(
        "pretrain", small.config, "--work-dir", tmp_path / "online", *STEPS, "--dataset.num-workers", "2", env=env
    )
    assert done.code == 0, done.err
    assert "prepared 48 samples" in done.err
    assert losses(tmp_path / "online") == reference[1]
    again = cli("pretrain", small.config, "--work-dir", tmp_path / "again", "--training.max-steps", "1", env=env)
    assert again.code == 0
    assert "prepared" not in again.err


def test_resume_equals_the_uninterrupted_run(
    small: Small, store: Path, cli: Callable[..., Finished], reference: tuple[Path, list[float]], tmp_path: Path
) -> None:
    checkpoint = reference[0] / "checkpoint-10"
    done = cli("pretrain", small.config, "--work-dir", tmp_path / "r", "--resume", checkpoint, *offline(store), *STEPS)
    assert done.code == 0, done.err
    assert losses(tmp_path / "r") == reference[1][10:]


def test_kill_9_while_a_checkpoint_is_written(
    small: Small, store: Path, cli: Callable[..., Finished], reference: tuple[Path, list[float]], tmp_path: Path
) -> None:
    work_dir = tmp_path / "killed"
    arguments = ["pretrain", str(small.config), "--work-dir", str(work_dir), *offline(store), *STEPS]
    command = [sys.executable, "-m", "llava_tune.cli.main", *arguments, "--training.save-steps", "2"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    staged = work_dir / ".saving"
    while process.poll() is None and not (step_of_last(work_dir) >= 4 and list(staged.glob("*/*"))):
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(staged.glob("checkpoint-*")), "the kill came too late to catch a checkpoint half-written"
    done = cli(*arguments, "--resume")
    assert done.code == 0, done.err
    assert losses(work_dir) == reference[1]


def step_of_last(work_dir: Path) -> int:
    return max((int(p.name.split("-")[1]) for p in work_dir.glob("checkpoint-*")), default=0)


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


def test_the_best_checkpoint_is_kept(
    small: Small, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are set by hand (0.9, 0.1, 0.5): the best is neither the last nor among those that save_total_limit keeps."""
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps(json.loads((small.folder / "data/test.json").read_text())[:3]))
    run = with_fields(
        load_run(small.config),
        {
            "work_dir": str(tmp_path / "run"),
            "dataset.offline_processed_text_folder": str(store),
            "training.save_steps": 2,
            "training.save_total_limit": 1,
            "training.max_steps": 6,
            "evaluation": Evaluation(every_steps=2, data_path=str(questions)),
        },
    )
    from llava_tune.train import evaluating, train

    scores = iter([0.9, 0.1, 0.5])
    monkeypatch.setattr(evaluating.EvaluationCallback, "_score", lambda self, answers: {"accuracy": next(scores)})
    train(run)
    kept = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-6"]
    assert json.loads((tmp_path / "run/best.json").read_text()) == {
        "checkpoint": "checkpoint-2",
        "step": 2,
        "score": 0.9,
    }
    rows = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]
    assert [(r["step"], r["best"]) for r in rows] == [(2, True), (4, False), (6, False)]


def test_evaluation_in_bf16_has_the_answers_of_the_checkpoint(
    small: Small, store: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    questions = small.folder / "data/train.json"
    more = ["--evaluation.every-steps", "4", "--evaluation.data-path", questions, "--evaluation.limit", "8"]
    done = cli(
        "pretrain", small.config, "--work-dir", tmp_path / "r", *offline(store), "--training.max-steps", "4",
        "--training.precision", "bf16", "--model.vision.freeze", *more,
    )  # fmt: skip
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "r/evaluation.jsonl").read_text())
    found = cli(
        "evaluate", tmp_path / "r/checkpoint-4", "--data", questions, "--image-folder", small.images, "--limit", "8"
    )
    assert found.code == 0, found.err
    answers = [
        json.loads(line)["correct"] for line in (tmp_path / "r/checkpoint-4/answers.jsonl").read_text().splitlines()
    ]
    assert row["scores"]["accuracy"] == sum(answers) / 8


def test_finetuning_starts_from_a_checkpoint_and_adds_lora(
    small: Small, store: Path, cli: Callable[..., Finished], reference: tuple[Path, list[float]], tmp_path: Path
) -> None:
    from safetensors import safe_open

    done = cli(
        "finetune", small.config, "--work-dir", tmp_path / "ft", *offline(store), "--model.init-from", reference[0] / "checkpoint-20",
        "--model.llm.freeze", "--model.llm.lora.rank", "4", "--training.max-steps", "3",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert losses(tmp_path / "ft")[0] < reference[1][0]
    with safe_open(tmp_path / "ft/checkpoint-3/model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any("lora_A" in n for n in names)


def test_bad_images_give_no_loss_and_are_listed(
    small: Small, store: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(small.images, folder)
    first, second = folder / "00003.png", folder / "00007.png"
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    arguments = [
        "pretrain",
        small.config,
        *offline(store),
        "--dataset.image-folder",
        folder,
        "--training.max-steps",
        "12",
    ]
    refused = cli(*arguments, "--work-dir", tmp_path / "a")
    assert "of 48 images could not be used, more than dataset.max_bad_share (1.0%)" in wrong_input(refused)
    done = cli(*arguments, "--work-dir", tmp_path / "b", "--dataset.max-bad-share", "0.1", "--dataset.num-workers", "2")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "b/quarantine.jsonl").read_text().splitlines()]
    assert {r["image"] for r in rows} == {"00003.png", "00007.png"}
    assert {r["reason"].split(":")[0] for r in rows} == {"can't be decoded", "no such file"}
    assert "2 image(s) could not be used" in done.err


def test_preview_prints_answers(small: Small, store: Path, cli: Callable[..., Finished], tmp_path: Path) -> None:
    more = (
        "--preview.every-steps",
        "2",
        "--preview.images",
        small.images / "00000.png",
        "--preview.max-new-tokens",
        "3",
    )
    done = cli(
        "pretrain", small.config, "--work-dir", tmp_path / "p", *offline(store), "--training.max-steps", "4", *more
    )
    assert done.code == 0, done.err
    assert "Describe this image. ->" in done.err
    assert (tmp_path / "p/preview.txt").read_text().count("step ") == 2


def test_what_does_not_fit_is_refused(
    small: Small, store: Path, cli: Callable[..., Finished], reference: tuple[Path, list[float]], tmp_path: Path
) -> None:
    run = ("pretrain", small.config, "--work-dir", tmp_path / "x")
    assert "256" not in wrong_input(cli(*run, "--training.global-batch-size", "3"))
    message = wrong_input(cli(*run, *offline(store), "--dataset.max-length", "100"))
    assert "dataset.max_length: the store has 128, the config says 100" in message
    message = wrong_input(cli(*run, "--dataset.image-folder", "/nowhere"))
    assert "dataset.image_folder /nowhere: no such folder" in message
    message = wrong_input(cli("pretrain", small.config, "--work-dir", reference[0]))
    assert "holds checkpoints of an earlier run" in message
    message = wrong_input(
        cli(*run, *offline(store), "--resume", reference[0] / "checkpoint-10", "--training.seed", "7")
    )
    assert "training.seed: the checkpoint has 42, the config says 7" in message
    message = wrong_input(cli(*run, "--launcher", "slurm"))
    assert "SLURM_PROCID" in message
    assert not (tmp_path / "x").exists()


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


def test_gradient_checkpointing_changes_no_loss_and_bf16_little(
    small: Small, store: Path, cli: Callable[..., Finished], reference: tuple[Path, list[float]], tmp_path: Path
) -> None:
    run = ("pretrain", small.config, *offline(store), *STEPS)
    done = cli(*run, "--work-dir", tmp_path / "g", "--training.gradient-checkpointing")
    assert done.code == 0, done.err
    close(losses(tmp_path / "g"), reference[1], 1e-6)
    done = cli(*run, "--work-dir", tmp_path / "b", "--training.precision", "bf16")
    assert done.code == 0, done.err
    close(losses(tmp_path / "b"), reference[1], 0.02)
    assert losses(tmp_path / "b") != reference[1]


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_ends_with_a_code_to_requeue_on(
    small: Small,
    store: Path,
    reference: tuple[Path, list[float]],
    cli: Callable[..., Finished],
    tmp_path: Path,
    number: int,
    processes: int,
) -> None:
    run = (
        "pretrain",
        small.config,
        "--work-dir",
        tmp_path / "run",
        *offline(store),
        *STEPS,
        "--training.save-steps",
        "100",
    )
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29731",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "llava_tune.cli.main", *map(str, run)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **(ranks if processes > 1 else {}),
                "RANK": str(k),
                "LOCAL_RANK": str(k),
            }
            if processes > 1
            else {**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for k in range(processes)
    ]
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and started[0].poll() is None
        time.sleep(0.02)
    started[-1].send_signal(number)  # one rank is enough
    errors = [process.communicate(timeout=200)[1].decode() for process in started]
    assert [process.returncode for process in started] == [75] * processes, errors
    assert "stopped for a signal after saving" in errors[0]
    steps = len(losses(tmp_path / "run"))
    assert 2 <= steps < 20
    assert (tmp_path / f"run/checkpoint-{steps}").is_dir()
    resumed = cli(*run, "--resume")
    assert resumed.code == 0, resumed.err
    close(losses(tmp_path / "run"), reference[1], 0 if processes == 1 else 1e-5)
