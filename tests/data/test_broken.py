"""A corpus of broken input: each is named by `doctor`, left out by `prepare`, and costs no other record."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from llava_tune.config import Lora, load_run, with_fields
from llava_tune.data import ImageTransform, LlavaDataset
from llava_tune.model.factory import build_llava
from llava_tune.model.size import parameter_counts
from tests.conftest import Finished, Small, wrong_input
from tests.data.test_golden import CONFIG


def said(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from": who, "value": text} for who, text in turns]


QA = said(("human", "q"), ("gpt", "a"))
QI = said(("human", "<image>\nq"), ("gpt", "a"))


def line(identity: str, **fields: Any) -> bytes:
    return json.dumps({"id": identity, "conversations": QA, **fields}).encode()


def talk(identity: str, *turns: tuple[Any, Any]) -> bytes:
    return line(identity, conversations=said(*turns))


DEEP = b"[" * 100_000 + b"]" * 100_000

# What can't be used. The value is part of the reason that must be given.
RECORDS: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"id": "cut off", "conversations": [{"from": "hu', "not valid JSON"),
    "a number": (b"5", "expected a JSON object"),
    "a string": (b'"x"', "expected a JSON object"),
    "a list": (b"[1]", "expected a JSON object"),
    "null": (b"null", "expected a JSON object"),
    "no conversations": (b'{"id": "no conversations"}', "'conversations'"),
    "conversations null": (line("conversations null", conversations=None), "'conversations'"),
    "conversations object": (line("conversations object", conversations={}), "'conversations'"),
    "conversations text": (line("conversations text", conversations="hi"), "'conversations'"),
    "conversations empty": (line("conversations empty", conversations=[]), "'conversations'"),
    "message number": (line("message number", conversations=[5, 6]), "message 0 must be an object"),
    "no from": (line("no from", conversations=[{"value": "q"}]), "no 'from'"),
    "no value": (line("no value", conversations=[{"from": "human"}]), "no 'value'"),
    "value null": (talk("value null", ("human", None), ("gpt", "a")), "'value' must be a string"),
    "value number": (talk("value number", ("human", "q"), ("gpt", 3)), "'value' must be a string"),
    "value list": (talk("value list", ("human", ["q"]), ("gpt", "a")), "'value' must be a string"),
    "unknown role": (talk("unknown role", ("human", "q"), ("robot", "a")), "unknown role 'robot'"),
    "role null": (talk("role null", (None, "q"), ("gpt", "a")), "unknown role None"),
    "late system": (talk("late system", ("human", "q"), ("system", "s"), ("gpt", "a")), "system message"),
    "only a question": (talk("only a question", ("human", "q")), "no question with an answer"),
    "only an answer": (talk("only an answer", ("gpt", "a")), "no question with an answer"),
    "system null": (line("system null", system=5), "'system' must be a string"),
    "no placeholder": (line("no placeholder", image="good.jpg"), "no <image> in the text"),
    "no image": (line("no image", conversations=QI), "but no image"),
    "one image too few": (
        line("one image too few", image="good.jpg", conversations=said(("human", "<image><image>"), ("gpt", "a"))),
        "2 <image> in the text but 1 image",
    ),
    "image number": (line("image number", image=7, conversations=QI), "'image' must be a path"),
    "image object": (line("image object", image={"path": "good.jpg"}, conversations=QI), "'image' must be a path"),
    "image null in list": (line("image null in list", image=[None], conversations=QI), "'image' must be a path"),
    "absolute": (line("absolute", image="/etc/passwd", conversations=QI), "leaves the image folder"),
    "parent": (line("parent", image="a/../../secret.jpg", conversations=QI), "leaves the image folder"),
    "backslash": (line("backslash", image="\\\\host\\x.jpg", conversations=QI), "leaves the image folder"),
    "null byte": (line("null byte", image="good.jpg\0.png", conversations=QI), "leaves the image folder"),
    "lone surrogate": (b'{"id": "x", "conversations": [{"from": "human", "value": "\\ud800 q"}]}', "not valid JSON"),
    "not UTF-8": (b'{"id": "x", "conversations": "\xff\xfe"}', "not valid JSON"),
    "raw control character": (b'{"id": "x\x01"}', "not valid JSON"),
    "NaN": (b'{"id": NaN}', "not valid JSON"),
    "trailing comma": (b'{"id": "x",}', "not valid JSON"),
    "single quotes": (b"{'id': 'x'}", "not valid JSON"),
    "two on a line": (line("two 1") + b" " + line("two 2"), "not valid JSON"),
    "nested too deep": (b'{"id": "deep", "conversations": ' + DEEP + b"}", "not valid JSON"),
}
# What is used, though it looks odd.
ODD: dict[str, bytes] = {
    "id number": line(7),  # type: ignore[arg-type]
    "id list": line(["x"]),  # type: ignore[arg-type]
    "no id": b'{"conversations": ' + json.dumps(QA).encode() + b"}",
    "huge number": b'{"id": "huge number", "n": 1'
    + b"0" * 400
    + b', "conversations": '
    + json.dumps(QA).encode()
    + b"}",
    "byte order mark": b"\xef\xbb\xbf" + line("byte order mark"),
    "carriage return": line("carriage return") + b"\r",
    "twice a key": b'{"id": "old", "id": "twice a key", "conversations": ' + json.dumps(QA).encode() + b"}",
    "white space image": line("white space image", image=""),
    "empty answer": talk("empty answer", ("human", "q"), ("gpt", "")),
    "right to left": talk("right to left", ("human", "שלום\u200b\u202e"), ("gpt", "🏳️‍🌈\u0000")),
    "200 MB": b'{"id": "200 MB", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "'
    + b"word " * 40_000_000
    + b'"}]}',
    "roles": talk("roles", ("gpt", "first"), ("human", "q"), ("gpt", "a"), ("human", "last")),
    "control text": talk("control text", ("human", "say <|im_end|>"), ("gpt", "<|im_start|>")),
    "placeholder in answer": talk("placeholder in answer", ("human", "q"), ("gpt", "<image>")),
    "same id": talk("same id", ("human", "one"), ("gpt", "1")),
    "same id again": talk("same id", ("human", "two"), ("gpt", "2")),
    "copy": talk("copy", ("human", "copied"), ("gpt", "c")),
    "copy again": talk("copy", ("human", "copied"), ("gpt", "c")),
    "10,000 turns": line("10,000 turns", conversations=QA * 5000),
}
NOTED = {
    "truncated": {"200 MB", "10,000 turns"},
    "roles": {"roles"},
    "control_text": {"control text"},
    "placeholder_in_answer": {"placeholder in answer"},
}


@pytest.fixture
def configured(tmp_path: Path, internlm2_tokenizer: Path) -> Callable[[Path], Path]:
    def write(data: Path) -> Path:
        config = tmp_path / "c.py"
        text = CONFIG.format(tokenizer=str(internlm2_tokenizer), data=str(data), folder=str(tmp_path / "images"))
        config.write_text(text.replace("max_bad_share=0.5", "max_bad_share=0.9"))
        return config

    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images/good.jpg")
    return write


def doctor(cli: Callable[..., Finished], config: Path, folder: Path, *more: str) -> tuple[Any, list[Any], Finished]:
    done = cli("doctor", config, "--json", folder / "r.json", "--list", folder / "bad.jsonl", "--no-model", *more)
    assert "Traceback" not in done.err, done.err
    lines = (folder / "bad.jsonl").read_text().splitlines()
    return json.loads((folder / "r.json").read_text()), [json.loads(text) for text in lines], done


@pytest.mark.slow
def test_broken_records(cli: Callable[..., Finished], tmp_path: Path, configured: Callable[[Path], Path]) -> None:
    assert len(RECORDS) + len(ODD) >= 55
    good = [talk(f"good {k}", ("human", f"q{k}"), ("gpt", f"a{k}")) for k in range(200)]
    lines = [*good[:100], *(raw for raw, _ in RECORDS.values()), b"", b"   ", *ODD.values(), *good[100:]]
    data = tmp_path / "d.jsonl"
    data.write_bytes(b"\n".join(lines) + b"\n")
    config = configured(data)
    report, bad, done = doctor(cli, config, tmp_path)
    assert done.code == 0, done.err
    by_line = {e["line"]: e["reason"] for e in bad}
    for number, (name, (_, reason)) in enumerate(RECORDS.items(), 101):
        assert reason in by_line.pop(number, "not found"), name
    assert by_line == {}
    found = {f["kind"]: f for f in report["findings"]}
    for kind, ids in NOTED.items():
        assert {e["id"] for e in found[kind]["examples"]} == ids
    assert [e["id"] for e in found["duplicate_id"]["examples"]] == ["same id"]
    assert found["duplicate"]["count"] >= 1 and "copy" in {e["id"] for e in found["duplicate"]["examples"]}

    done = cli("prepare", config, "--save-folder", tmp_path / "s")
    assert done.code == 0, done.err
    listed = [json.loads(text) for text in (tmp_path / "s/left_out.jsonl").read_text().splitlines()]
    assert {e["line"]: e["reason"] for e in listed} == {e["line"]: e["reason"] for e in bad}
    ids = datasets.load_from_disk(str(tmp_path / "s"))["id"][:]
    assert len(ids) == 200 + len(ODD)
    assert [i for i in ids if i.startswith("good")] == [f"good {k}" for k in range(200)]
    skipped = cli(
        "prepare",
        config,
        "--save-folder",
        tmp_path / "s2",
        "--skip",
        tmp_path / "bad.jsonl",
        "--dataset.max-bad-share",
        "0",
    )
    assert skipped.code == 0, skipped.err


def make_images(folder: Path) -> dict[str, str | None]:
    """Write odd and broken images; the finding that each must give, or None."""
    noise = Image.effect_noise((200, 150), 90).convert("RGB")
    noise.save(folder / "whole.jpg", quality=95)
    noise.save(folder / "whole.png")
    for name in ("whole.jpg", "whole.png"):
        content = (folder / name).read_bytes()
        (folder / f"half {name}").write_bytes(content[: len(content) // 2])
        (folder / f"tail {name}").write_bytes(content + b"trailing bytes")
    (folder / "zero.jpg").touch()
    (folder / "text.jpg").write_text("<html>404 not found</html>")
    (folder / "drawing.svg").write_text("<svg/>")
    noise.save(folder / "png as jpg.jpg", format="PNG")
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("I;16", (40, 40), 300).save(folder / "sixteen.png")
    Image.new("LA", (40, 40)).save(folder / "grey alpha.png")
    Image.new("P", (40, 40)).save(folder / "palette.png", transparency=0)
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(folder / "turned.jpg", exif=exif)
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    Image.new("RGB", (2000, 100)).save(folder / "narrow.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    noise.save(folder / "with spaces.jpg")
    noise.save(folder / "名前 ünï.jpg")
    noise.save(folder / "question?row=1.jpg")
    outside = folder.parent / "secret.jpg"
    noise.save(outside)
    (folder / "link out.jpg").symlink_to(outside)
    (folder / "link in.jpg").symlink_to(folder / "whole.jpg")
    (folder / "link gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    broken, missing, outside_kind = "image_broken", "image_missing", "image_outside"
    return {
        "whole.jpg": None, "whole.png": None, "tail whole.jpg": None, "tail whole.png": None,
        "half whole.jpg": broken, "half whole.png": broken, "zero.jpg": broken, "text.jpg": broken, "drawing.svg": broken,
        "folder.jpg": broken, "pipe.jpg": broken, "x" * 300 + ".jpg": broken,
        "nowhere.jpg": missing, "WHOLE.JPG": missing, "link gone.jpg": missing, "a.tar?offset=0&size=5&name=x": missing,
        "link out.jpg": outside_kind, "bomb.png": "image_huge",
        "png as jpg.jpg": "image_suffix", "cmyk.jpg": "image_mode", "sixteen.png": "image_mode", "grey alpha.png": "image_mode",
        "palette.png": "image_mode", "moving.gif": "image_animated", "moving.webp": "image_animated", "turned.jpg": "image_rotated",
        "narrow.png": "image_narrow", "dot.png": None, "with spaces.jpg": None, "名前 ünï.jpg": None, "question?row=1.jpg": None,
        "link in.jpg": None,
    }  # fmt: skip


def test_broken_images(cli: Callable[..., Finished], tmp_path: Path, configured: Callable[[Path], Path]) -> None:
    cases = make_images(tmp_path / "images")
    assert len(cases) >= 30
    data = tmp_path / "d.json"
    rows = [{"id": f"i{k}", "image": name, "conversations": QI} for k, name in enumerate(cases)]
    data.write_text(json.dumps(rows))
    report, bad, done = doctor(cli, configured(data), tmp_path)
    assert done.code == 0, done.err
    found: dict[str, set[str]] = {}
    for finding in report["findings"]:
        for example in finding["examples"]:
            if "image" in example:
                found.setdefault(example["image"], set()).add(finding["kind"])
    for name, kind in cases.items():
        kinds = found.pop(name, set())
        assert kinds == set() if kind is None else kind in kinds, name
    assert found == {}
    lost = {
        name for name, kind in cases.items() if kind in ("image_broken", "image_missing", "image_outside", "image_huge")
    }
    assert {e["image"] for e in bad} == lost

    config = configured(data)
    assert cli("prepare", config, "--save-folder", tmp_path / "s").code == 0
    dataset = LlavaDataset(tmp_path / "s", tmp_path / "images", ImageTransform(8), quarantine=tmp_path / "q.jsonl")
    for k, name in enumerate(cases):
        sample = dataset[k]
        assert (sample.bad_image is not None) == (name in lost), name
        assert sample.pixel_values[0].shape == (3, 8, 8)
        assert (sample.labels >= 0).any() == (name not in lost)
    assert dataset.quarantine is not None
    assert {e["image"] for e in dataset.quarantine.entries()} == lost
    # What training found is what `prepare --skip` leaves out.
    done = cli("prepare", config, "--save-folder", tmp_path / "s2", "--skip", tmp_path / "q.jsonl")
    assert f"{len(cases) - len(lost)} samples" in done.out, done.err


ONE = line("one")
FILES: dict[str, tuple[bytes, str]] = {
    "empty.json": (b"", "empty"),
    "white.json": (b" \n\t ", "empty"),
    "half.json": (b"[" + ONE + b"," + ONE[:20], "not closed"),
    "after.json": (b"[" + ONE + b"] and more", "goes on with"),
    "twice.json": (b"[" + ONE + b"]\n[" + ONE + b"]", "goes on with"),
    "text.json": (b"hello", "expected a JSON array"),
    "number.json": (b"12", "expected a JSON array"),
    "binary.jsonl": (bytes(range(128, 256)) * 4, "expected a JSON array"),
    "utf16.json": ((b"[" + ONE + b"]").decode().encode("utf-16"), "expected a JSON array"),
    "no record.json": (b"[]", "holds no record"),
    "other keys.json": (b'[{"prompt": "x"}]', "the first record has the keys prompt"),
    "half.jsonl.gz": (gzip.compress(ONE * 1000)[:-30], "can't be decompressed"),
    "not.jsonl.gz": (ONE, "can't be decompressed"),
    "not.jsonl.zst": (ONE, "can't be decompressed"),
    "not.parquet": (ONE, "not a Parquet file"),
    "half.parquet": (b"PAR1" + ONE, "not a whole Parquet file"),
    "not.tar": (ONE * 100, "not a whole tar file"),
    "not.arrow": (ONE, "not a whole Arrow file"),
}


@pytest.mark.parametrize("name", [*FILES, "missing.json"])
def test_broken_files(
    cli: Callable[..., Finished], tmp_path: Path, configured: Callable[[Path], Path], name: str
) -> None:
    data = tmp_path / name
    content, reason = FILES.get(name, (None, "no such file"))
    if content is not None:
        data.write_bytes(content)
    config = configured(data)
    message = wrong_input(cli("prepare", config, "--save-folder", tmp_path / "s"))
    assert reason in message
    assert str(data) in message
    report, _, done = doctor(cli, config, tmp_path)
    assert done.code == 1
    assert reason in report["findings"][0]["examples"][0]["reason"]
    assert not (tmp_path / "s/llava_tune_manifest.json").exists()


def test_the_model_and_the_disk_are_looked_at(
    small: Small, cli: Callable[..., Finished], tmp_path: Path, configured: Callable[[Path], Path]
) -> None:
    done = cli("doctor", small.config)
    assert done.code == 0, done.out + done.err
    assert "nothing was found that would harm the run" in done.out or "note" in done.out
    data = tmp_path / "d.json"
    data.write_text(json.dumps([{"id": 1, "conversations": QA}]))
    done = cli("doctor", configured(data))  # its language model is a tokenizer alone
    assert done.code == 1
    assert "parts of the model that can't be had" in done.out
    huge = tmp_path / "huge.py"
    huge.write_text(
        f"import dataclasses\nfrom llava_tune.config import *\nrun = load_run({str(small.config)!r})\n"
        "run = with_fields(run, {'training.save_total_limit': 10**12})\n"
    )
    done = cli("doctor", huge, "--json", tmp_path / "r.json")
    assert done.code == 1
    finding = json.loads((tmp_path / "r.json").read_text())["findings"][0]
    assert finding["kind"] == "disk" and "the work dir has" in finding["examples"][0]["reason"]


def test_sizes_are_those_of_the_model_that_is_built(small: Small) -> None:
    run = with_fields(load_run(small.config), {"model.llm.freeze": True, "model.llm.lora": Lora(rank=4)})
    llava = build_llava(run.model)
    counted = parameter_counts(run.model)
    for part in ("vision", "projector", "llm"):
        parameters = list(getattr(llava, part).parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert counted[part] == (sum(p.numel() for p in parameters), trained)
