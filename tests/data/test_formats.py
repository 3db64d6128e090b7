"""The golden conversations in every format give the golden ids; images are found in files, tars and tables."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_tune.config import Dataset, DataSource
from llava_tune.data import ImageTransform, LlavaDataset
from llava_tune.data.formats import alpaca, messages, sharegpt
from llava_tune.data.mix import image_folders, shares
from llava_tune.data.records import BadRecord, parse_record
from llava_tune.data.sources import open_sources
from llava_tune.data.store import read_manifest
from llava_tune.errors import InputError
from tests.conftest import Finished, wrong_input
from tests.data.test_golden import CONFIG

Records = list[dict[str, Any]]


def jpeg(color: str, size: tuple[int, int] = (40, 30)) -> bytes:
    """A small image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG")
    return file.getvalue()


def as_messages(record: dict[str, Any]) -> dict[str, Any]:
    """A LLaVA record as Hugging Face's messages, images as parts of their own where `<image>` is."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns: list[dict[str, Any]] = []
    for message in record["conversations"]:
        content: Any = message["value"]
        if "<image>" in content:
            before, after = content.split("<image>")
            parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
            content = [p for p in parts if p.get("text", "x")]
        turns.append({"role": roles[message["from"]], "content": content})
    return {"id": record["id"], "messages": turns, "images": [record["image"]] if "image" in record else []}


def write_json(records: Records, folder: Path) -> Path:
    (folder / "d.json").write_text(json.dumps(records, indent=2, ensure_ascii=False))
    return folder / "d.json"


def write_jsonl_gz(records: Records, folder: Path) -> Path:
    lines = [json.dumps(r).encode() + b"\n" for r in records]
    # Two members behind one another, as `cat a.gz b.gz` gives.
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:3])) + gzip.compress(b"".join(lines[3:])))
    return folder / "d.jsonl.gz"


def write_json_zst(records: Records, folder: Path) -> Path:
    with pa.CompressedOutputStream(str(folder / "d.json.zst"), "zstd") as file:
        file.write(json.dumps(records).encode())
    return folder / "d.json.zst"


def write_parquet(records: Records, folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(records), folder / "d.parquet", row_group_size=2)
    return folder / "d.parquet"


def write_parquet_of_json_text(records: Records, folder: Path) -> Path:
    rows = [{**r, "conversations": json.dumps(r["conversations"])} for r in records]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    return folder / "d.parquet"


def write_saved(records: Records, folder: Path) -> Path:
    datasets.Dataset.from_list(records).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def write_folder(records: Records, folder: Path) -> Path:
    (folder / "many").mkdir()
    for k in range(0, len(records), 2):
        (folder / f"many/{k:03}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[k : k + 2]))
    (folder / "many/README.md").write_text("not data")
    return folder / "many"


def write_pattern(records: Records, folder: Path) -> Path:
    return write_folder(records, folder) / "*.jsonl"


def write_messages(records: Records, folder: Path) -> Path:
    (folder / "d.jsonl").write_text("".join(json.dumps(as_messages(r)) + "\n" for r in records))
    return folder / "d.jsonl"


def write_sharegpt(records: Records, folder: Path) -> Path:
    rows = []
    for record in records:
        said = record["conversations"]
        system = said[0]["value"] if said[0]["from"] == "system" else ""
        images = [record["image"]] if "image" in record else []
        rest = said[1:] if system else said
        rows.append({"id": record["id"], "conversations": rest, "system": system, "images": images})
    (folder / "d.json").write_text(json.dumps(rows))
    return folder / "d.json"


WRITERS = [
    write_json,
    write_jsonl_gz,
    write_json_zst,
    write_parquet,
    write_parquet_of_json_text,
    write_saved,
    write_folder,
    write_pattern,
    write_messages,
    write_sharegpt,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__.removeprefix("write_"))
def test_golden_ids_in_every_format(
    shared: Path, internlm2_tokenizer: Path, cli: Callable[..., Finished], tmp_path: Path, write: Any
) -> None:
    golden = json.loads((shared / "golden_ids/internlm2_llava_golden.json").read_text())
    cases = golden["cases"]
    records = [{"id": c["name"], "image": "x.jpg", "conversations": c["conversations"]} for c in cases]
    data = write(records, tmp_path)
    config = tmp_path / "c.py"
    config.write_text(CONFIG.format(tokenizer=str(internlm2_tokenizer), data=str(data), folder=str(tmp_path)))
    done = cli("prepare", config, "--save-folder", tmp_path / "s")
    assert done.code == 0, done.err
    rows = datasets.load_from_disk(str(tmp_path / "s"))
    assert [(r["id"], r["input_ids"], r["labels"], r["image"]) for r in rows] == [
        (c["name"], c["input_ids"], c["labels"], ["x.jpg"]) for c in cases
    ]


def write_tar(path: Path, records: Records, colors: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for k, (record, color) in enumerate(zip(records, colors, strict=True)):
            for name, data in ((f"{k:05}.jpg", jpeg(color)), (f"{k:05}.json", json.dumps(record).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


COLORS = ["red", "lime", "blue", "white", "black"]


def colored(k: int) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image>\nWhich color?"}, {"from": "gpt", "value": COLORS[k]}]
    return {"id": f"c{k}", "image": f"{k}.jpg", "conversations": said}


def write_in_tar(folder: Path) -> Path:
    write_tar(folder / "a.tar", [colored(k) for k in range(5)], COLORS)
    return folder / "a.tar"


def write_in_parquet(folder: Path) -> Path:
    rows = [{**colored(k), "image": {"bytes": jpeg(c), "path": None}} for k, c in enumerate(COLORS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def write_in_saved(folder: Path) -> Path:
    rows = [{**colored(k), "images": [Image.open(io.BytesIO(jpeg(c)))]} for k, c in enumerate(COLORS)]
    for row in rows:
        row.pop("image")
    conversation = datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")})
    features = datasets.Features(
        {"id": datasets.Value("string"), "conversations": conversation, "images": datasets.List(datasets.Image())}
    )
    data = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("write", [write_in_tar, write_in_parquet, write_in_saved])
def test_images_inside_the_data_are_trained_on_where_they_are(
    internlm2_tokenizer: Path, cli: Callable[..., Finished], tmp_path: Path, write: Any
) -> None:
    data = write(tmp_path)
    config = tmp_path / "c.py"
    text = CONFIG.format(tokenizer=str(internlm2_tokenizer), data=str(data), folder=str(tmp_path))
    config.write_text(text.replace(f"image_folder={str(tmp_path)!r}, ", ""))
    split = ["--dataset.split", "train"] if data.is_dir() else []
    if split:
        assert "must name one of its splits: train, test" in wrong_input(
            cli("prepare", config, "--save-folder", tmp_path / "s")
        )
    done = cli("prepare", config, "--save-folder", tmp_path / "s", *split)
    assert done.code == 0, done.err
    manifest = read_manifest(tmp_path / "s")
    assert manifest["samples"] == manifest["images"] == 5
    folders = image_folders(Dataset(data_path=str(data), split="train" if split else None), manifest)
    dataset = LlavaDataset(tmp_path / "s", folders, ImageTransform(8, (0, 0, 0), (1, 1, 1)))
    for k, expected in enumerate([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 0)]):
        sample = dataset[k]
        assert sample.bad_image is None
        assert sample.pixel_values[0].mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=0.02)


def test_the_shared_messages_files_are_read(shared: Path) -> None:
    for path in sorted((shared / "messages_format").glob("*.jsonl")):
        good = 0
        for line in path.read_text().splitlines():
            record = parse_record(messages(json.loads(line)), "?")
            good += 1
            assert len(record.images) == sum(q.count("<image>") for q, _ in record.rounds)
        assert good == len(path.read_text().splitlines())


def test_what_formats_make_of_a_record() -> None:
    pair = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    assert sharegpt({"conversations": list(pair), "images": ["x.jpg"], "system": "s"}) == {
        "id": None, "image": ["x.jpg"], "system": "s", "conversations": list(pair),
    }  # fmt: skip
    made = alpaca({"instruction": "do", "input": "this", "output": "done", "history": [["a", "b"]]})
    assert [m["value"] for m in made["conversations"]] == ["a", "b", "do\nthis", "done"]
    parts = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "file://x.jpg"}}]
    record = messages([{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}])
    assert record["image"] == ["x.jpg"]
    assert record["conversations"][0]["value"] == "Look:\n<image>"
    for url, why in (("data:image/png;base64,AA", "inside the record"), ("https://x.org/a.jpg", "on the web")):
        part = {"type": "image_url", "image_url": {"url": url}}
        with pytest.raises(BadRecord, match=why):
            messages([{"role": "user", "content": [part]}])


def test_a_converter_of_ones_own_and_an_unknown_format(
    internlm2_tokenizer: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"frage": f"q{k}", "antwort": f"a{k}"}) + "\n" for k in range(4)))
    config = tmp_path / "c.py"
    text = CONFIG.format(tokenizer=str(internlm2_tokenizer), data=str(data), folder=str(tmp_path))
    config.write_text(text)
    message = wrong_input(cli("prepare", config, "--save-folder", tmp_path / "s"))
    assert "the first record has the keys antwort, frage" in message
    assert "dataset.convert" in message
    function = """
def german(record):
    if record["frage"] == "q1":
        return None
    if record["frage"] == "q2":
        raise ValueError("no")
    return {"conversations": [{"from": "human", "value": record["frage"]}, {"from": "gpt", "value": record["antwort"]}]}
"""
    config.write_text(function + text.replace("image_folder", "convert=german, image_folder"))
    done = cli("prepare", config, "--save-folder", tmp_path / "s", "--dataset.max-bad-share", "0.5")
    assert done.code == 0, done.err
    assert "2 samples" in done.out
    assert "1 records: left out by dataset.convert" in done.out
    assert "ValueError: no" in (tmp_path / "s/left_out.jsonl").read_text()
    config.write_text(function.replace("q1", "q3") + text.replace("image_folder", "convert=german, image_folder"))
    message = wrong_input(cli("prepare", config, "--save-folder", tmp_path / "s", "--dataset.max-bad-share", "0.5"))
    assert "dataset.convert of d has changed" in message


def test_several_data_sets_and_their_mix(
    internlm2_tokenizer: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    for name, count in (("a", 100), ("b", 40)):
        rows = [
            {"id": f"{name}{k}", "conversations": [{"from": "human", "value": f"q{k}"}, {"from": "gpt", "value": name}]}
            for k in range(count)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    config = tmp_path / "c.py"
    text = CONFIG.format(tokenizer=str(internlm2_tokenizer), data="x", folder=str(tmp_path))
    two = "sources=[DataSource(data_path={!r}, split='[:50%]'), DataSource(data_path={!r}, repeat=2.5, template='vicuna')], "
    config.write_text(text.replace("data_path='x', ", two.format(str(tmp_path / "a.json"), str(tmp_path / "b.json"))))
    done = cli("prepare", config, "--save-folder", tmp_path / "s")
    assert done.code == 0, done.err
    assert "a: 100 samples" in done.out and "b: 40 samples" in done.out
    manifest = read_manifest(tmp_path / "s")
    sources = (DataSource(data_path="a", split="[:50%]"), DataSource(data_path="b", repeat=2.5))
    taken = shares(Dataset(sources=sources), manifest)
    assert [(s.start, s.stop, s.count) for s in taken] == [(0, 50, 50), (100, 140, 100)]
    sources = (DataSource(data_path="a", share=0.75), DataSource(data_path="b", share=0.25))
    assert [s.count for s in shares(Dataset(sources=sources), manifest)] == [105, 35]
    with pytest.raises(InputError, match=r"add up to 0\.8"):
        Dataset(sources=(DataSource(data_path="a", share=0.5), DataSource(data_path="b", share=0.3)))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"id": 1}\n' * 5000, mtime=0)[:-20], "can't be decompressed"),
        ("no.parquet", b"not parquet at all", "not a Parquet file"),
        ("cut.parquet", b"PAR1 and then nothing", "not a whole Parquet file"),
        ("no.tar", b"x" * 2000, "not a whole tar file"),
        ("empty.jsonl", b"", "empty"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}.*{why}"):
        for source in open_sources(str(tmp_path / name)):
            list(source.spans())
