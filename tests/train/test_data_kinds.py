"""Training on other kinds of data: text alone, several data sets mixed, a folder that another program tokenized."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from llava_tune.config import load_run
from llava_tune.data import ImageTransform, LlavaDataset
from llava_tune.data.order import BatchOrder, Share
from llava_tune.data.store import open_foreign, open_store
from llava_tune.errors import InputError
from tests.conftest import REPOSITORY, Finished, Small, losses, wrong_input

pytestmark = pytest.mark.timeout(300)


def alpaca_file(path: Path, count: int) -> Path:
    rows = [{"instruction": f"Say {k}", "input": "twice" if k % 2 else "", "output": f"{k} {k}"} for k in range(count)]
    path.write_text(json.dumps(rows))
    return path


def with_changes(small: Small, path: Path, model: str = "", data: str = "") -> Path:
    path.write_text(
        "import dataclasses\nfrom llava_tune.config import DataSource, load_run\n"
        f"run = load_run({str(small.config)!r})\n"
        f"model = dataclasses.replace(run.model, {model})\n"
        f"run = dataclasses.replace(run, model=model, dataset=dataclasses.replace(run.dataset, {data}))\n"
    )
    return path


def test_text_alone_through_the_tool_and_its_modified_config(
    small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    data = alpaca_file(tmp_path / "alpaca.json", 60)
    config = with_changes(
        small, tmp_path / "text.py", "vision=None", f"data_path={str(data)!r}, image_folder=None, system='Be brief.'"
    )
    tool = REPOSITORY / "tools/process_untokenized_datasets.py"
    done = subprocess.run(
        [sys.executable, tool, config, "--save-folder", tmp_path / "s", "--dataset.max-length", "90"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "60 samples" in done.stdout
    modified = tmp_path / "text_modified.py"
    run = load_run(modified)
    assert (run.dataset.offline_processed_text_folder, run.dataset.max_length) == (str(tmp_path / "s"), 90)
    prepared = cli("finetune", modified, "--work-dir", tmp_path / "run", env={"NPROC_PER_NODE": "2"})
    assert prepared.code == 0, prepared.err
    found = losses(tmp_path / "run")
    assert len(found) == 6 and found[-1] < found[0]
    checkpoint = max((tmp_path / "run").glob("checkpoint-*"))
    questions = tmp_path / "q.json"
    said = [{"from": "human", "value": "Say 7"}, {"from": "gpt", "value": "7 7"}]
    questions.write_text(json.dumps([{"id": 1, "conversations": said}]))
    answered = cli("evaluate", checkpoint, "--data", questions)
    assert answered.code == 0, answered.err
    message = wrong_input(
        cli(
            "finetune",
            config,
            "--work-dir",
            tmp_path / "x",
            "--dataset.data-path",
            small.captions,
            "--dataset.image-folder",
            small.images,
        )
    )
    assert "model.vision is None, but the data has" in message


def test_images_and_text_mixed_by_weight(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    data = alpaca_file(tmp_path / "alpaca.json", 30)
    sources = f"(DataSource(data_path={str(small.captions)!r}, name='pictures'), DataSource(data_path={str(data)!r}, repeat=2))"
    config = with_changes(small, tmp_path / "mix.py", "", f"data_path=None, sources={sources}")
    done = cli("pretrain", config, "--work-dir", tmp_path / "run")
    assert done.code == 0, done.err
    assert "pictures: 48 samples, 48 of them in use, 48 an epoch (1.00 times; 44.4% of the mix)" in done.err
    assert "alpaca: 30 samples, 30 of them in use, 60 an epoch (2.00 times; 55.6% of the mix)" in done.err


def test_the_mix_of_an_epoch_is_exact_and_covers_all() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 150).astype(np.int32)
    shares = [Share(0, 100, 50), Share(100, 120, 20), Share(120, 150, 75)]

    def epoch(number: int) -> list[int]:
        order = BatchOrder(
            lengths, shares=shares, seed=3, global_batch_size=5, micro_batch_size=5, group_by_length=True, total_steps=1
        )
        found = order.epoch(number)
        assert len(found) == 29
        return [row for k in range(len(found)) for row in found[k]]  # type: ignore[misc]

    first, second = epoch(0), epoch(1)
    for rows in (first, second):
        assert sum(row < 100 for row in rows) == 50
        assert sorted(row for row in rows if 100 <= row < 120) == list(range(100, 120))
        assert {rows.count(row) for row in range(120, 150)} == {2, 3}
    # Half of the first data set in each epoch, the other half in the next.
    assert sorted(row for row in first + second if row < 100) == list(range(100))
    assert epoch(0) == first


def test_a_folder_of_another_program_is_taken_when_told_to(
    small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    assert cli("prepare", small.config, "--save-folder", tmp_path / "ours").code == 0
    rows = open_store(tmp_path / "ours")
    like_xtuner = datasets.Dataset.from_dict(
        {
            "input_ids": rows["input_ids"][:],
            "labels": rows["labels"][:],
            "image": [images[0] for images in rows["image"]],
            "conversation": [[{"input": "q", "output": "a"}] for _ in rows],
        }
    )
    like_xtuner.save_to_disk(str(tmp_path / "theirs"))
    theirs = ("--dataset.offline-processed-text-folder", tmp_path / "theirs")
    assert "holds no llava_tune_manifest.json" in wrong_input(cli("pretrain", small.config, *theirs))
    found, lengths, _ = open_foreign(tmp_path / "theirs", 16)
    assert lengths.tolist() == rows["length"][:]
    assert len(found) == 48
    trusted = cli("pretrain", small.config, *theirs, "--dataset.trust-processed-folder", "--work-dir", tmp_path / "a")
    assert trusted.code == 0, trusted.err
    transform = ImageTransform(64)
    ours = LlavaDataset(tmp_path / "ours", small.images, transform)
    foreign = LlavaDataset(tmp_path / "theirs", small.images, transform, foreign=True, image_tokens=16)
    for k in range(48):
        a, b = ours.sample(k), foreign.sample(k)
        assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels)
        assert torch.equal(a.pixel_values[0], b.pixel_values[0])

    for broken, why in (
        (like_xtuner.remove_columns("labels"), "expected a column 'labels'"),
        (like_xtuner.remove_columns("image"), "the column 'image' names 0 images"),
        (like_xtuner.map(lambda row: {"labels": row["labels"][:-1]}), "differ in length"),
    ):
        folder = tmp_path / why[:12].replace("'", "")
        broken.save_to_disk(str(folder))
        with pytest.raises(InputError, match=why):
            open_foreign(folder, 16)


def test_packing_on_two_processes_and_resumed_on_one(
    small: Small, cli: Callable[..., Finished], two_ranks: Callable[..., Finished], tmp_path: Path
) -> None:
    run = ("pretrain", small.config, "--training.packing", "--training.max-steps", "8", "--training.save-steps", "4")
    run = (*run, "--dataset.max-length", "200", "--training.micro-batch-size", "1", "--training.global-batch-size", "2")
    one = cli(*run, "--work-dir", tmp_path / "one")
    assert one.code == 0, one.err
    assert "packing: rows of 200 tokens" in one.err
    two = two_ranks(*run, "--work-dir", tmp_path / "two")
    assert two.code == 0, two.err
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    padding = [json.loads(line)["padding"] for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    assert max(padding) < 0.2
    shutil.rmtree(tmp_path / "two/checkpoint-8")
    resumed = cli(*run, "--work-dir", tmp_path / "two", "--resume")
    assert resumed.code == 0, resumed.err
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
