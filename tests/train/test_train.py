"""Training as users start it: online and offline, resumed, killed, stopped."""

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
from tests.conftest import Finished, Small, losses, wrong_input
from tests.train.conftest import STEPS, close, offline

pytestmark = pytest.mark.timeout(400)


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
