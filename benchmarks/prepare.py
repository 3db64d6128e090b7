"""How fast `prepare` is, from the command to the finished store, start-up included.

python benchmarks/prepare.py ../shared/data 100000 [1000000 ...]

Records are tiled from easy-VQA, COCO captions, ShareGPT and Chinese dialogues, each text made unique so that no cache helps; the
tokenizer is InternLM2's. In the same run, bare sentencepiece encodes the same texts on the same cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

RUNS = 3
CONFIG = """from llava_tune.config import *
run = Run(
    model=Model(llm=LanguageModel(name={tokenizer!r}), vision=VisionTower(name="ViT-L-14-336-quickgelu")),
    dataset=Dataset(data_path={data!r}, image_folder={folder!r}, max_length=4096),
    optimizer=Optimizer(learning_rate=1e-3),
    training=Training(global_batch_size=8),
)
"""


def base_records(shared: Path) -> list[dict[str, Any]]:
    """The real records, in the mix that has a mean of about 127 tokens."""
    easy = json.loads((shared / "easy_vqa/easy_vqa_train.json").read_text())[:390]
    coco = json.loads((shared / "coco_captions/coco_captions.json").read_text())
    chat = json.loads((shared / "sharegpt/dummy_conversation.json").read_text())
    chinese = [json.loads(line) for line in (shared / "dialogues_zh/smile_50.jsonl").read_text().splitlines()]
    return [*easy, *coco * 4, *chat[:250], *chinese[:20]]


def write_records(base: list[dict[str, Any]], path: Path, count: int) -> None:
    """`count` records as one JSON array; each text of each record ends in its own number."""
    templates = []
    for record in base:
        copy = json.loads(json.dumps(record))
        copy["id"] = "@"
        for message in copy["conversations"]:
            message["value"] += " @"
        templates.append(msgspec.json.encode(copy).split(b"@"))
    with path.open("wb") as file:
        for i in range(count):
            file.write((b"[\n" if i == 0 else b",\n") + str(i).encode().join(templates[i % len(templates)]))
        file.write(b"\n]\n")


def peak_memory(process: subprocess.Popen[bytes], stop: threading.Event, peak: list[int], every: float) -> None:
    """The largest sum of PSS of a process and its children, sampled; in peak[0], bytes."""
    import psutil

    while not stop.is_set():
        try:
            parent = psutil.Process(process.pid)
            total = sum(p.memory_full_info().pss for p in [parent, *parent.children(recursive=True)])
            peak[0] = max(peak[0], total)
        except psutil.Error:
            pass
        time.sleep(every)


def run_prepare(config: Path, store: Path, every: float | None) -> tuple[float, int]:
    """Seconds from the command to its end, and the peak memory, looked at every so many seconds; 0 without."""
    shutil.rmtree(store, ignore_errors=True)
    stop, peak = threading.Event(), [0]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_tune.cli.main", "prepare", config, "--save-folder", store],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    watcher = threading.Thread(target=peak_memory, args=(process, stop, peak, every))
    if every is not None:
        watcher.start()
    if process.wait():
        raise SystemExit("prepare failed")
    seconds = time.monotonic() - started
    stop.set()
    if every is not None:
        watcher.join()
    return seconds, peak[0]


def sentencepiece_worker(arguments: tuple[str, list[str]]) -> int:
    import sentencepiece

    model, texts = arguments
    encode = sentencepiece.SentencePieceProcessor(model_file=model).encode
    return sum(len(encode(t)) for t in texts)


def bare_sentencepiece(shared: Path, data: Path, cores: int) -> float:
    """Tokens a second of sentencepiece alone on the texts of 50,000 of the records, already in memory, on all cores."""
    records = msgspec.json.decode(data.read_bytes())
    texts = [m["value"] for r in records for m in r["conversations"]]
    model = str(shared / "internlm2_tokenizer/tokenizer.model")
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(sentencepiece_worker, [(model, ["warm up"])] * cores)
        started = time.monotonic()
        total = sum(pool.map(sentencepiece_worker, [(model, texts[i::cores]) for i in range(cores)]))
        return total / (time.monotonic() - started)


def measure(shared: Path, folder: Path, count: int) -> dict[str, float]:
    """`prepare` on `count` records: the median of three runs up to a million."""
    data, store = folder / f"{count}.json", folder / f"store-{count}"
    write_records(base_records(shared), data, count)
    config = folder / "c.py"
    names = {"tokenizer": shared / "internlm2_tokenizer", "data": data, "folder": shared}
    config.write_text(CONFIG.format(**{k: str(v) for k, v in names.items()}))
    if count > 1_000_000:  # once is enough: looking four times a second costs little there
        seconds, peak = run_prepare(config, store, 0.25)
    else:  # looking often enough for a short run would slow it: memory is measured in a run of its own
        seconds = statistics.median(run_prepare(config, store, None)[0] for _ in range(RUNS))
        peak = run_prepare(config, store, 0.02)[1]
    manifest = json.loads((store / "llava_tune_manifest.json").read_text())
    size = sum(p.stat().st_size for p in store.iterdir())
    text_tokens = manifest["tokens"] - 575 * manifest["images"]
    return {
        "records": count,
        "seconds": seconds,
        "records/s": count / seconds,
        "tokens/s": text_tokens / seconds,
        "tokens/record": text_tokens / count,
        "bytes/record": size / count,
        "peak MB (PSS)": peak / 1e6,
    }


def main() -> None:
    shared, counts = Path(sys.argv[1]).resolve(), [int(n) for n in sys.argv[2:]] or [100_000]
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as name:
        folder = Path(name)
        write_records(base_records(shared), folder / "warm.json", 100)
        rows = []
        for count in counts:
            row = measure(shared, folder, count)
            rows.append(row)
            print(f"{count:,} records: {row['records/s']:,.0f} records/s", file=sys.stderr, flush=True)
        write_records(base_records(shared), folder / "bare.json", 50_000)
        bare = bare_sentencepiece(shared, folder / "bare.json", cores)
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "-:|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:,.0f}" if v >= 100 else f"{v:.1f}" for v in row.values()) + " |")
    ratios = ", ".join(f"{row['tokens/s'] / bare:.2f}" for row in rows)
    print(f"bare sentencepiece on the same {cores} cores: {bare:,.0f} tokens/s; prepare is {ratios} times that")


if __name__ == "__main__":
    main()
