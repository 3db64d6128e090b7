"""What opening a store and drawing the first global batch of a length-grouped epoch cost, whatever the store's size.

python benchmarks/open.py ../shared/data FOLDER 100000 1000000 10000000

Stores are made in FOLDER (10 million samples: 11 GB, and 6 GB of JSON meanwhile) and kept for the next run. Each is opened in
a fresh process. "own" memory is the process's anonymous pages (RssAnon) beyond what it held after its imports; "mapped" are pages of the
store's files (RssFile), which belong to the page cache: all ranks of a node share them, and they go when memory is short.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from prepare import CONFIG, base_records, write_records

BATCH = 256


def make_store(shared: Path, folder: Path, count: int) -> Path:
    """A store of `count` samples, prepared from the records of benchmarks/prepare.py."""
    store = folder / f"store-{count}"
    if (store / "llava_tune_manifest.json").is_file():
        return store
    data, config = folder / f"{count}.json", folder / f"{count}.py"
    write_records(base_records(shared), data, count)
    names = {"tokenizer": shared / "internlm2_tokenizer", "data": data, "folder": shared}
    config.write_text(CONFIG.format(**{k: str(v) for k, v in names.items()}))
    command = [sys.executable, "-m", "llava_tune.cli.main", "prepare", str(config), "--save-folder", str(store)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    data.unlink()
    return store


def measure(store: Path, images: Path) -> dict[str, float]:
    """In this process: open, then draw."""
    import datasets  # noqa: F401 - its import is not what is measured
    import torch  # noqa: F401

    from llava_tune.data import ImageTransform, LlavaDataset
    from llava_tune.data.order import BatchOrder

    before = resident()
    started = time.perf_counter()
    dataset = LlavaDataset(store, images, ImageTransform(336))
    opened = time.perf_counter()
    order = BatchOrder(
        dataset.lengths,
        seed=1,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        group_by_length=True,
        total_steps=10**9,
    )
    first = next(iter(order))
    drawn = time.perf_counter()
    rows = [dataset.rows[i] for i in first]
    read = time.perf_counter()
    assert len(rows) == BATCH
    after = resident()
    return {
        "samples": len(dataset),
        "open s": opened - started,
        "first batch's rows s": drawn - opened,
        "reading them s": read - drawn,
        "own MB": (after["RssAnon"] - before["RssAnon"]) / 1e6,
        "mapped MB": (after["RssFile"] - before["RssFile"]) / 1e6,
    }


def resident() -> dict[str, int]:
    """RssAnon and RssFile of this process, bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def main() -> None:
    shared, folder, counts = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), [int(n) for n in sys.argv[3:]]
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for count in counts:
        store = make_store(shared, folder, count)
        command = [sys.executable, __file__, "--measure", str(store), str(shared)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "-:|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:,.0f}" if v >= 100 else f"{v:.3f}" for v in row.values()) + " |")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
