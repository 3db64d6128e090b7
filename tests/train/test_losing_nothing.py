"""A run that goes wrong says why, changes nothing it shouldn't, and goes on from where it was."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_tune.config import load_run
from llava_tune.errors import InputError
from llava_tune.model.factory import build_llava
from llava_tune.train.checkpoint import verify
from llava_tune.train.optimizer import parameter_groups
from tests.conftest import REPOSITORY, Finished, Small, losses, wrong_input

pytestmark = pytest.mark.timeout(500)
KILLS = int(os.environ.get("LLAVA_TUNE_KILLS", "3"))


def flags(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in ("--training." + name.replace("_", "-"), str(value))]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_records(
    small: Small, cli: Callable[..., Finished], two_ranks: Callable[..., Finished], tmp_path: Path
) -> None:
    both = two_ranks("pretrain", small.config, "--work-dir", tmp_path / "two", "--optimizer.learning-rate", "1e30")
    assert both.code == 1 and both.err.count("\nerror") == 1 and "error (rank 1)" not in both.err, both.err
    done = cli("pretrain", small.config, "--work-dir", tmp_path / "run", "--optimizer.learning-rate", "1e30")
    assert done.code == 1, done.err
    assert "Traceback" not in done.err
    assert "the loss is nan" in done.err or "norm is" in done.err
    (entry,) = read_lines(tmp_path / "run/skipped.jsonl")
    known = {str(record["id"]) for record in json.loads(small.captions.read_text())}
    assert len(entry["ids"]) == 4 and set(entry["ids"]) <= known
    assert entry["rule"] == "stop"

    bundle = json.loads((tmp_path / "run/crash/rank-00000.json").read_text())
    assert bundle["ids"] == entry["ids"]
    assert bundle["error"].startswith("SharedRunFailed") and any("judge" in line for line in bundle["traceback"])
    assert torch.__version__.startswith(bundle["versions"]["torch"])
    assert bundle["config"]["optimizer"]["learning_rate"] == 1e30
    assert [row["step"] for row in bundle["last_metrics"]] == list(range(1, len(losses(tmp_path / "run")) + 1))
    assert "most recent call first" in (tmp_path / "run/crash/rank-00000.stack").read_text()


def odd_data(small: Small, path: Path) -> Path:
    """The captions, one of them with an answer that no model expects."""
    records = json.loads(small.captions.read_text())
    noise = random.Random(0)
    records[5]["id"] = "odd"
    records[5]["conversations"][1]["value"] = "".join(chr(noise.randrange(0x4E00, 0x9FFF)) for _ in range(20))
    path.write_text(json.dumps(records))
    return path


def test_a_jump_of_the_loss_is_skipped_and_named(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    data = odd_data(small, tmp_path / "odd.json")
    common = ("pretrain", small.config, "--dataset.data-path", data, *flags(max_steps=60, spike_factor=1.7))
    done = cli(*common, "--work-dir", tmp_path / "skip", *flags(bad_step="skip"))
    assert done.code == 0, done.err
    skipped = read_lines(tmp_path / "skip/skipped.jsonl")
    assert skipped and all("odd" in entry["ids"] for entry in skipped), skipped
    assert len(losses(tmp_path / "skip")) == 60
    stopped = cli(*common, "--work-dir", tmp_path / "stop")
    assert stopped.code == 1 and "times the median" in stopped.err and "odd" in stopped.err
    # Both runs are the same up to there, and the run that stopped has made no step with that batch.
    first = int(skipped[0]["step"])
    assert losses(tmp_path / "stop") == losses(tmp_path / "skip")[: first - 1]
    blind = tmp_path / "blind.json"
    unchecked = {"stage": 2}, {"bf16": {"enabled": "auto", "check_grad_overflow": False}}
    for stage, more in (({"stage": 0}, {}), unchecked):
        blind.write_text(json.dumps({"zero_optimization": stage, **more, "train_micro_batch_size_per_gpu": "auto"}))
        refused = cli(*common, "--work-dir", tmp_path / "no", *flags(bad_step="skip"), "--deepspeed", blind)
        assert "looks at its gradients" in wrong_input(refused)


@pytest.mark.slow
def test_deepspeed_skips_what_a_run_without_it_skips(
    small: Small, cli: Callable[..., Finished], two_ranks: Callable[..., Finished], tmp_path: Path
) -> None:
    data = odd_data(small, tmp_path / "odd.json")
    common = ("finetune", small.config, "--dataset.data-path", data)
    common += tuple(flags(max_steps=30, spike_factor=1.7, bad_step="skip"))

    def run(
        name: str, command: Callable[..., Finished], *more: str
    ) -> tuple[list[dict[str, Any]], dict[int, set[str]]]:
        done = command(*common, "--work-dir", tmp_path / name, *more)
        assert done.code == 0, done.err
        skipped: list[Any] = read_lines(tmp_path / name / "skipped.jsonl")
        return read_lines(tmp_path / name / "metrics.jsonl"), {e["step"]: set(e["ids"]) for e in skipped}

    expected, skipped = run("plain", cli)
    assert skipped and len(expected) == 30
    for preset in ("deepspeed_zero2", "deepspeed_zero3_offload"):
        rows, left_out = run(preset, two_ranks, "--deepspeed", preset)
        assert left_out == skipped
        for row, other in zip(rows, expected, strict=True):
            # The schedule goes on over a step left out, in both.
            assert row["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-9)
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
            norms = {k: v for k, v in row.items() if k.startswith("grad_norm_") and row["step"] not in skipped}
            assert norms == pytest.approx({k: other[k] for k in norms}, rel=2e-3)


def test_a_skipped_step_changes_no_weight(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is bad: the five in a row that end the run have left the weights as they were drawn."""
    from llava_tune.train import train

    run = load_run(small.config)
    run = dataclasses.replace(
        run,
        work_dir=str(tmp_path / "run"),
        training=dataclasses.replace(run.training, bad_step="skip", max_steps=20),
    )
    seen = {}
    from llava_tune.train import trainer as module

    class Spoilt(module.LlavaTrainer):
        def compute_loss(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            seen.setdefault("before", {n: p.detach().clone() for n, p in self.model.named_parameters()})
            seen["after"] = self.model
            self._step_loss.fill_(math.nan)
            return super().compute_loss(*args, **kwargs)

    monkeypatch.setattr("llava_tune.train.session.LlavaTrainer", Spoilt)
    with pytest.raises(RuntimeError, match="5th time in a row"):
        train(run)
    assert len(read_lines(tmp_path / "run/skipped.jsonl")) == 5
    assert all(torch.equal(p, seen["before"][n]) for n, p in seen["after"].named_parameters())


def test_a_broken_checkpoint_is_refused_and_another_named(
    small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    run = ("pretrain", small.config, "--work-dir", tmp_path / "run", *flags(max_steps=4, save_steps=2))
    assert cli(*run).code == 0
    weights = tmp_path / "run/checkpoint-4/model.safetensors"
    verify(weights.parent, hashes=True)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    verify(weights.parent, hashes=False)
    message = wrong_input(cli(*run, "--resume"))
    assert "checkpoint-4 is broken: model.safetensors is not what was written" in message
    assert "checkpoint-2" in message
    (weights.parent / "trainer_state.json").unlink()
    with pytest.raises(InputError, match=r"trainer_state\.json is missing"):
        verify(weights.parent, hashes=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", folder]).returncode:
        pytest.skip("needs root to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_refused_before_the_old_checkpoint_goes(
    small: Small, cli: Callable[..., Finished], small_disk: Path
) -> None:
    run = ("pretrain", small.config, "--work-dir", small_disk / "run", *flags(save_steps=2, save_total_limit=1))
    assert cli(*run, *flags(max_steps=2)).code == 0
    size = sum(p.stat().st_size for p in (small_disk / "run/checkpoint-2").rglob("*") if p.is_file())
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - size // 2))
    full = cli(*run, *flags(max_steps=6), "--resume")
    assert full.code == 1 and "Traceback" not in full.err, full.err
    assert "Nothing was written or removed" in full.err and "checkpoint-2 is whole" in full.err
    verify(small_disk / "run/checkpoint-2", hashes=True)
    (small_disk / "other").unlink()
    done = cli(*run, *flags(max_steps=6), "--resume")
    assert done.code == 0, done.err
    assert [p.name for p in (small_disk / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_disk_that_fills_while_writing_leaves_the_old_checkpoint(
    small: Small, cli: Callable[..., Finished], small_disk: Path
) -> None:
    """The estimate of the first checkpoint can't know all: here another program fills the disk."""
    hook = small_disk / "fill.py"
    hook.write_text(
        "import llava_tune.train.trainer as t, shutil, sys\nfrom llava_tune.cli.main import main\n"
        "def fill(*a):\n"
        f"    free = shutil.disk_usage({str(small_disk)!r}).free\n"
        f"    open({str(small_disk / 'other')!r}, 'wb').write(bytes(max(0, free - 400_000)))\n"
        "t.check_space = fill\nmain()\n"
    )
    arguments = ["pretrain", small.config, "--work-dir", small_disk / "run", *flags(save_steps=2)]
    done = subprocess.run(
        [sys.executable, hook, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "the disk is full: checkpoint-2 could not be written" in done.stderr
    assert not list((small_disk / "run").glob("**/checkpoint-*"))


@pytest.mark.slow
def test_bad_images_leave_the_others_loss_as_it_is(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    """Three of 300 images are cut off, one of them in the first batch: its loss is that of the other three records, computed here one by
    one; the run sees all records and lists exactly the three."""
    from llava_tune.data import Collator, LlavaDataset
    from llava_tune.data.images import image_transform
    from llava_tune.data.order import BatchOrder
    from llava_tune.demo.scenes import write_data

    write_data(tmp_path, train=300, test=1, seed=3)
    images = tmp_path / "images"
    source = ("--dataset.data-path", tmp_path / "captions.json", "--dataset.image-folder", images)
    assert cli("prepare", small.config, *source, "--save-folder", tmp_path / "store").code == 0
    run = load_run(small.config)
    whole = LlavaDataset(tmp_path / "store", images, image_transform(run.model.vision, False))
    assert len(whole) == 300
    order = BatchOrder(
        whole.lengths, seed=42, global_batch_size=4, micro_batch_size=4, group_by_length=True, total_steps=75
    )
    batches = [rows for _, rows in order.steps()]
    torch.manual_seed(42)
    llava = build_llava(run.model, seed=42)
    assert llava.vision is not None
    collate = Collator(llava.vision.tokens, 64)
    bad = {whole.rows[rows[2]]["image"][0] for rows in (batches[0], batches[30], batches[74])}
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in batches[0]:
            if bad & set(whole.rows[row]["image"]):
                continue
            inputs = collate([whole[row]])
            count = int((inputs["labels"][:, 1:] >= 0).sum())
            total += float(llava(**inputs)["loss"]) * count
            tokens += count
    for image in bad:
        (images / image).write_bytes((images / image).read_bytes()[:100])  # the smallest have 178
    done = cli(
        *("pretrain", small.config, "--work-dir", tmp_path / "run", *source),
        *("--dataset.offline-processed-text-folder", tmp_path / "store", "--dataset.max-bad-share", "0.03"),
        *flags(max_steps=75),
    )
    assert done.code == 0, done.err
    found = losses(tmp_path / "run")
    assert len(found) == 75 and found[0] == pytest.approx(total / tokens, rel=1e-5)
    listed = [row["image"] for row in read_lines(tmp_path / "run/quarantine.jsonl")]
    assert len(listed) == 3 and set(listed) == bad


def test_layer_wise_decay_of_the_vision_tower(small: Small, tmp_path: Path) -> None:
    tower = tmp_path / "tower.json"
    tower.write_text(
        '{"embed_dim": 32, "vision_cfg": {"image_size": 64, "layers": 5, "width": 64, "patch_size": 16, "head_width": 32}, '
        '"text_cfg": {}}'
    )
    run = load_run(small.config)
    assert run.model.vision is not None
    vision = dataclasses.replace(run.model.vision, name=str(tower))
    llava = build_llava(dataclasses.replace(run.model, vision=vision))
    optimizer = dataclasses.replace(
        run.optimizer, learning_rate=1e-3, vision_learning_rate=1e-4, vision_layer_decay=0.5
    )
    names = {id(p): n for n, p in llava.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in parameter_groups(llava, optimizer) for p in g["params"]}
    assert len(rates) == sum(p.requires_grad for p in llava.parameters())
    # Features are the last block but one: four blocks are left, and the last of them learns at the tower's own rate.
    for block, rate in enumerate((1.25e-5, 2.5e-5, 5e-5, 1e-4)):
        assert rates[f"vision.visual.transformer.resblocks.{block}.mlp.c_fc.weight"] == pytest.approx(rate)
    assert rates["vision.visual.conv1.weight"] == pytest.approx(6.25e-6)
    assert {rate for name, rate in rates.items() if not name.startswith("vision")} == {1e-3}


STEPS = 60


def start(small: Small, work_dir: Path, processes: int, port: int) -> list[subprocess.Popen[bytes]]:
    arguments = ["pretrain", small.config, "--work-dir", work_dir, "--resume"]
    arguments += flags(max_steps=STEPS, save_steps=7, log_ids=True, micro_batch_size=2)
    arguments.remove("True")
    ranks = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "llava_tune.cli.main", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"}
            | ({**ranks, "RANK": str(k), "LOCAL_RANK": str(k)} if processes > 1 else {}),
        )
        for k in range(processes)
    ]


def ids_of(work_dir: Path) -> dict[int, list[str]]:
    """The record ids of each step, over all ranks; the ranks that a step was made on are those of its last line."""
    steps: dict[int, list[str]] = {}
    for path in sorted(work_dir.glob("ids-rank-*.jsonl")):
        for row in read_lines(path):
            steps.setdefault(int(row["step"]), []).extend(row["ids"])  # type: ignore[call-overload,arg-type]
    return steps


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_random_kills_lose_no_step_and_no_record(small: Small, tmp_path: Path) -> None:
    """LLAVA_TUNE_KILLS times kill -9, TERM or USR1 of one of two ranks at a random moment; once on one process instead of two."""
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    for process in start(small, reference, 2, 29741):
        assert process.wait(300) == 0
    expected = losses(reference)
    assert len(expected) == STEPS
    chance = random.Random(7)
    kills = 0
    while kills < KILLS:
        processes = 1 if kills == KILLS // 2 else 2
        running = start(small, killed, processes, 29742 + kills)
        deadline = time.monotonic() + chance.uniform(4, 14)
        while time.monotonic() < deadline and all(p.poll() is None for p in running):
            time.sleep(0.02)
        if all(p.poll() == 0 for p in running):  # the run was through before the kill
            break
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
        victim = chance.choice(running)
        victim.send_signal(number)
        kills += 1
        if number == signal.SIGKILL or victim.wait(120) != 75:  # a launcher would end the others
            for process in running:
                process.kill()
        for process in running:
            process.wait(120)
        for checkpoint in killed.glob("checkpoint-*"):
            verify(checkpoint, hashes=True)
    for process in start(small, killed, 2, 29790):
        assert process.wait(300) == 0
    found = losses(killed)
    assert len(found) == STEPS
    # One process adds the micro batches' gradients in another order than two: nothing but rounding.
    assert found == pytest.approx(expected, rel=1e-6)
    seen, wanted = ids_of(killed), ids_of(reference)
    assert {step: sorted(ids) for step, ids in seen.items()} == {step: sorted(ids) for step, ids in wanted.items()}
    epoch = [identity for step in range(1, 13) for identity in wanted[step]]  # 48 records, 4 a step
    assert sorted(epoch) == sorted(str(r["id"]) for r in json.loads(small.captions.read_text()))
