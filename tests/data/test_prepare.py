"""`prepare` as users meet it: killed, repeated, refused, and with bad records."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from llava_tune.config import load_run, with_fields
from llava_tune.data import preparation, prepare
from llava_tune.data import store as stores
from llava_tune.data.preparation import finalize
from llava_tune.data.shards import Shard, parse_shard, slurm_shard
from llava_tune.data.sources import base
from llava_tune.errors import InputError
from tests.conftest import Finished, Small, wrong_input


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def many_records(small: Small, path: Path, count: int) -> Path:
    """The small captions tiled, each text made unique."""
    base = json.loads(small.captions.read_text())
    rows = []
    for i in range(count):
        row = json.loads(json.dumps(base[i % len(base)]))
        row["id"] = f"r{i}"
        row["conversations"][1]["value"] += f" Number {i}."
        rows.append(row)
    path.write_text(json.dumps(rows))
    return path


# A part of the store is a few kilobytes of source here, so that a small file has many.
TINY_PARTS = """
import sys
import llava_tune.data.sources.base as s
s.PART_BYTES = 30_000
import llava_tune.data.pool
llava_tune.data.pool.SMALL_BYTES = 0
from llava_tune.cli.main import main
if __name__ == "__main__":
    main()
"""


def test_load_from_disk_shows_ids_labels_image_and_length(
    small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    done = cli("prepare", small.config, "--save-folder", tmp_path / "s")
    assert done.code == 0, done.err
    rows = datasets.load_from_disk(str(tmp_path / "s"))
    assert rows.column_names == ["id", "input_ids", "labels", "image", "length"]
    assert rows.features == datasets.Features.from_arrow_schema(stores.SCHEMA)
    for row in rows:
        assert row["length"] == len(row["input_ids"]) + 15 * len(row["image"])
        assert len(row["labels"]) == len(row["input_ids"])
        assert row["input_ids"].count(-200) == 1
    assert "48 samples" in done.out
    again = cli("prepare", small.config, "--save-folder", tmp_path / "s")
    assert "is prepared already and fits" in again.out


def test_the_tool_is_the_same_as_the_verb(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools/process_untokenized_llava_data.py"
    subprocess.run(
        [sys.executable, tool, small.config, "--save-folder", tmp_path / "tool"], check=True, capture_output=True
    )
    cli("prepare", small.config, "--save-folder", tmp_path / "verb")
    assert digest(tmp_path / "tool") == digest(tmp_path / "verb")


def test_nothing_that_takes_long_is_imported(small: Small, tmp_path: Path) -> None:
    code = "import sys\nfrom llava_tune.cli.main import main\nmain()\n"
    code += "print('imported', sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "prepare", small.config, "--save-folder", tmp_path / "s"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "imported []"


@pytest.mark.slow
def test_kill_9_at_20_moments_of_three_shards_with_four_processes(small: Small, tmp_path: Path) -> None:
    data = many_records(small, tmp_path / "many.json", 20_000)
    script = tmp_path / "tiny_parts.py"
    script.write_text(TINY_PARTS)

    def command(folder: Path, processes: int, *more: str) -> list[str]:
        fields = ["--dataset.data-path", str(data), "--num-proc", str(processes), *more]
        return [sys.executable, str(script), "prepare", str(small.config), "--save-folder", str(folder), *fields]

    subprocess.run(command(tmp_path / "reference", 1), check=True, capture_output=True)
    reference = digest(tmp_path / "reference")
    assert len([name for name in reference if name.endswith(".arrow")]) > 100
    started = time.monotonic()
    subprocess.run(command(tmp_path / "again", 1), check=True, capture_output=True)
    whole = time.monotonic() - started

    rng = random.Random(0)
    caught = kills = 0
    while kills < 20:
        folder = tmp_path / f"killed{kills}"
        for _ in range(4):
            shards = [
                subprocess.Popen(
                    command(folder, 4, "--shard", f"{i}/3"),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                for i in (1, 2, 3)
            ]
            time.sleep(rng.uniform(0.2, 1.0) * whole)
            for shard in rng.sample(shards, rng.choice([1, 2, 3])):  # one machine, or several
                kills += 1
                caught += shard.poll() is None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(shard.pid, signal.SIGKILL)
            for shard in shards:
                shard.wait()
            if not (folder / stores.MANIFEST).exists():
                with pytest.raises(InputError):
                    stores.open_store(folder)
        shards = [
            subprocess.Popen(command(folder, 2, "--shard", f"{i}/3"), stdout=subprocess.DEVNULL) for i in (1, 2, 3)
        ]
        assert [shard.wait() for shard in shards] == [0, 0, 0]
        assert digest(folder) == reference
    assert caught >= 10, f"only {caught} of {kills} kills came before the end"


def bad_cases(good: dict[str, Any]) -> list[dict[str, Any]]:
    without_image = {**good, "id": "no-image"}
    del without_image["image"]
    text = json.loads(json.dumps(good).replace("<image>\\n", ""))
    return [
        without_image,
        {**text, "id": "no-placeholder"},
        {**good, "id": "escape", "image": "../../secret.png"},
        {"id": "empty"},
    ]


def test_bad_records_are_listed_with_id_line_and_reason(
    small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    good = json.loads(small.captions.read_text())[:6]
    rows = [*good[:3], *bad_cases(good[0]), *good[3:]]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"id": "cut\n')
    arguments = ["prepare", small.config, "--dataset.data-path", data]
    message = wrong_input(cli(*arguments, "--save-folder", tmp_path / "a"))
    assert "5 of 11 records (45.5%) are bad, more than dataset.max_bad_share (1.0%)" in message
    assert not (tmp_path / "a" / stores.MANIFEST).exists()
    done = cli(*arguments, "--save-folder", tmp_path / "a", "--dataset.max-bad-share", "0.5")
    assert done.code == 0, done.err
    assert "5 records were left out" in done.out
    listed = [json.loads(line) for line in (tmp_path / "a/left_out.jsonl").read_text().splitlines()]
    found = {e["id"]: (e["line"], e["reason"]) for e in listed}
    assert found["no-image"] == (4, "1 <image> in the text but no image")
    assert found["no-placeholder"] == (5, "1 image(s) but no <image> in the text")
    assert found["escape"] == (6, "the image path '../../secret.png' leaves the image folder")
    assert found["empty"][0] == 7
    assert found["part 0 record 10"][0] == 11
    assert "not valid JSON" in found["part 0 record 10"][1]
    assert datasets.load_from_disk(str(tmp_path / "a"))["id"][:] == [r["id"] for r in good]


def test_line_numbers_in_an_indented_array(small: Small, tmp_path: Path) -> None:
    good = json.loads(small.captions.read_text())[:4]
    text = json.dumps([good[0], good[1], {"id": "bad"}, good[2]], indent=2)
    (tmp_path / "d.json").write_text(text)
    run = load_run(small.config)
    import dataclasses

    run = dataclasses.replace(
        run, dataset=dataclasses.replace(run.dataset, data_path=str(tmp_path / "d.json"), max_bad_share=0.5)
    )
    prepare(run, tmp_path / "s")
    (entry,) = [json.loads(line) for line in (tmp_path / "s/left_out.jsonl").read_text().splitlines()]
    assert text.splitlines()[entry["line"] - 1 : entry["line"] + 1] == ["  {", '    "id": "bad"']


def test_wrong_inputs(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    save = ("--save-folder", tmp_path / "s")
    text = small.captions.read_text()
    (tmp_path / "half.json").write_text(text[: len(text) // 2])
    assert "not closed" in wrong_input(
        cli("prepare", small.config, *save, "--dataset.data-path", tmp_path / "half.json")
    )
    assert "no such folder" in wrong_input(
        cli("prepare", small.config, *save, "--dataset.image-folder", tmp_path / "no")
    )
    assert "no such file" in wrong_input(
        cli("prepare", small.config, *save, "--dataset.data-path", tmp_path / "no.json")
    )
    assert "one image takes 16 tokens" in wrong_input(cli("prepare", small.config, *save, "--dataset.max-length", "16"))
    assert "did you mean 'chatml'" in wrong_input(cli("prepare", small.config, *save, "--dataset.template", "chatlm"))
    assert "which the tokenizer lacks" in wrong_input(
        cli("prepare", small.config, *save, "--dataset.template", "llama3_chat")
    )
    assert "--save-folder" in wrong_input(cli("prepare", small.config))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("x")
    assert "is not empty" in wrong_input(cli("prepare", small.config, "--save-folder", tmp_path / "full"))
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["precious"]


def test_a_store_of_another_tokenizer_or_max_length_is_refused(small: Small, tmp_path: Path) -> None:
    import dataclasses

    from llava_tune.demo.small import write_language_model

    run = load_run(small.config)
    prepare(run, tmp_path / "s")
    write_language_model(tmp_path / "other", ["quite other words"], vocab_size=300, width=64)
    llm = dataclasses.replace(run.model.llm, name=str(tmp_path / "other"))
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, llm=llm))
    with pytest.raises(InputError, match=r"model.llm.tokenizer: the store has \w{64}, the config says \w{64}"):
        prepare(other, tmp_path / "s")
    longer = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, max_length=256))
    with pytest.raises(InputError, match=r"dataset\.max_length: the store has 128, the config says 256"):
        prepare(longer, tmp_path / "s")


def test_a_changed_source_is_noticed(small: Small, tmp_path: Path) -> None:
    import dataclasses

    data = many_records(small, tmp_path / "d.json", 20)
    run = load_run(small.config)
    run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, data_path=str(data)))
    prepare(run, tmp_path / "s")
    os.utime(data, (1, 1))  # another time, the same content
    assert prepare(run, tmp_path / "s").was_there
    data.write_text(data.read_text().replace("Number 7", "Number 8"))
    with pytest.raises(InputError, match="has changed since the store"):
        prepare(run, tmp_path / "s")


def test_a_store_with_a_part_missing_or_cut_is_refused(small: Small, tmp_path: Path) -> None:
    prepare(load_run(small.config), tmp_path / "s")
    part = tmp_path / "s/data-00000.arrow"
    content = part.read_bytes()
    part.write_bytes(content[:-10])
    with pytest.raises(InputError, match="the manifest says"):
        stores.open_store(tmp_path / "s")
    part.unlink()
    with pytest.raises(InputError, match="is missing"):
        stores.open_store(tmp_path / "s")


def test_truncation_keeps_images_whole_and_drops_what_has_nothing_supervised(small: Small, tmp_path: Path) -> None:
    import dataclasses

    long = "word " * 300
    rows = [
        {
            "id": "cut",
            "image": "00000.png",
            "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": long}],
        },
        {
            "id": "gone",
            "image": "00000.png",
            "conversations": [{"from": "human", "value": "<image>\n" + long}, {"from": "gpt", "value": "a"}],
        },
        {
            "id": "second image gone",
            "image": ["00000.png", "00001.png"],
            "conversations": [
                {"from": "human", "value": "<image>\nq"},
                {"from": "gpt", "value": "word " * 20},
                {"from": "human", "value": "<image>\nq"},
                {"from": "gpt", "value": "b"},
            ],
        },
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    run = load_run(small.config)
    changed = {"data_path": str(tmp_path / "d.json"), "max_bad_share": 0.5, "max_length": 64}
    run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, **changed))
    done = prepare(run, tmp_path / "s")
    assert (done.samples, done.left_out, done.truncated) == (2, 1, 3)
    found = {row["id"]: row for row in datasets.load_from_disk(str(tmp_path / "s"))}
    assert found["cut"]["length"] == 64
    assert found["cut"]["image"] == ["00000.png"]
    second = found["second image gone"]
    assert second["image"] == ["00000.png"]
    assert second["input_ids"].count(-200) == 1
    assert second["length"] <= 64


def test_disk_full_is_one_error_and_leaves_nothing_half_written(small: Small, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", disk], capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs (root)")
    try:
        data = many_records(small, tmp_path / "many.json", 4000)
        fields = ["--dataset.data-path", data, "--save-folder", disk / "s", "--dataset.num-proc", "1"]
        command = [sys.executable, "-m", "llava_tune.cli.main", "prepare", small.config, *fields]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert "No space left on device" in done.stderr
        assert not list((disk / "s").glob("*.arrow"))
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        subprocess.run(command, check=True, capture_output=True)
        assert len(stores.open_store(disk / "s")) == 4000
    finally:
        subprocess.run(["umount", disk], check=True)


def test_part_size_does_not_change_the_samples(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(small.config)
    prepare(run, tmp_path / "one", num_proc=1)
    monkeypatch.setattr(base, "PART_BYTES", 700)
    prepare(run, tmp_path / "many", num_proc=1)
    one, many = (datasets.load_from_disk(str(tmp_path / name)) for name in ("one", "many"))
    assert len(list((tmp_path / "many").glob("*.arrow"))) > 10
    assert one[:] == many[:]


def test_shards_in_any_order_and_finalize(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PART_BYTES", 20_000)
    run = with_fields(
        load_run(small.config), {"dataset.data_path": str(many_records(small, tmp_path / "m.json", 1000))}
    )
    prepare(run, tmp_path / "reference", num_proc=1)
    done = prepare(run, tmp_path / "s", num_proc=1, shard=Shard(2, 3))
    assert done.missing > 0 and 0 < done.samples < 1000
    with pytest.raises(InputError, match=r"parts are missing, the first is number 1\. Run the shards"):
        finalize(run, tmp_path / "s")
    with pytest.raises(InputError, match="has not finished"):
        stores.open_store(tmp_path / "s")
    assert prepare(run, tmp_path / "s", num_proc=1, shard=Shard(0, 3)).missing > 0
    last = prepare(run, tmp_path / "s", num_proc=1, shard=Shard(1, 3))
    assert (last.missing, last.samples) == (0, 1000)
    assert digest(tmp_path / "s") == digest(tmp_path / "reference")
    assert finalize(run, tmp_path / "s").was_there


def test_a_store_that_another_shard_finished_meanwhile(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PART_BYTES", 20_000)
    run = with_fields(load_run(small.config), {"dataset.data_path": str(many_records(small, tmp_path / "m.json", 500))})
    prepare(run, tmp_path / "reference", num_proc=1)
    write = preparation._Preparation.write

    def overtaken(self: Any, num_proc: int, shard: Shard, report: Any) -> Any:
        found = write(self, num_proc, shard, report)
        if shard.index == 0:  # the other one ends between our last look and our return
            assert prepare(run, tmp_path / "s", num_proc=1, shard=Shard(1, 2)).missing == 0
            (tmp_path / "s/parts").mkdir()  # what our own last note of the source's spans may bring back
        return found

    monkeypatch.setattr(preparation._Preparation, "write", overtaken)
    done = prepare(run, tmp_path / "s", num_proc=1, shard=Shard(0, 2))
    assert (done.was_there, done.missing, done.samples) == (True, 0, 500)
    assert not (tmp_path / "s/parts").exists()
    assert digest(tmp_path / "s") == digest(tmp_path / "reference")


def test_a_store_whose_last_shard_died_before_the_manifest_is_finalized(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(small.config)
    prepare(run, tmp_path / "reference", num_proc=1)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(run, tmp_path / "s", num_proc=1)
    assert finalize(run, tmp_path / "s").samples == 48
    assert digest(tmp_path / "s") == digest(tmp_path / "reference")


@pytest.mark.parametrize(
    ("environ", "shard"),
    [
        ({}, Shard(0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, Shard(0, 1)),  # a batch script itself
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, Shard(3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_MAX": "13"}, Shard(2, 4)),
        (
            {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "12", "SLURM_ARRAY_TASK_STEP": "4",
             "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
            Shard(5, 8),
        ),
    ],
)  # fmt: skip
def test_the_shard_that_slurm_gives(environ: dict[str, str], shard: Shard) -> None:
    assert slurm_shard(environ) == shard


def test_a_shard_by_hand() -> None:
    assert parse_shard("1/4") == Shard(0, 4)
    for wrong in ("0/4", "5/4", "4", "a/b", "-1/2"):
        with pytest.raises(InputError, match="I from 1 to N"):
            parse_shard(wrong)
