"""What the ranks of a node cost as they start, of a run on 256: bytes read, files open, memory; for stores of any size.

python benchmarks/ranks.py ../shared/data FOLDER 100000 1000000 10000000 [--ranks 256] [--node 8]

A node's 8 ranks run here at once, as ranks 0 to 7 of 256: each opens the store, makes its order, and draws its part of the first and of
the ten-thousandth global batch of a length-grouped epoch. Own memory is RssAnon beyond what the imports take; mapped pages belong to the
page cache, once for all ranks of a node.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from open import make_store, resident


def measure(store: Path, images: Path, rank: int, ranks: int) -> dict[str, float]:
    """In a fresh process: one rank's start."""
    import datasets  # noqa: F401 - its import is not what is measured
    import torch  # noqa: F401

    from llava_tune.data import ImageTransform, LlavaDataset
    from llava_tune.data.order import BatchOrder

    before, read_before = resident(), _read()
    began = time.perf_counter()
    dataset = LlavaDataset(store, images, ImageTransform(336))
    order = BatchOrder(
        dataset.lengths,
        seed=1,
        global_batch_size=4 * ranks,
        micro_batch_size=4,
        group_by_length=True,
        rank=rank,
        world_size=ranks,
        total_steps=10**9,
    )
    first = next(iter(order))
    rows = [dataset.rows[i] for i in first]
    seconds = time.perf_counter() - began
    assert len(rows) == 4
    after, read = resident(), _read()
    return {
        "seconds": seconds,
        "read": read - read_before,
        "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "own": after["RssAnon"] - before["RssAnon"],
        "mapped": after["RssFile"] - before["RssFile"],
        "rows": len(set(first)),
    }


def _read() -> int:
    """Bytes that this process has asked to read (read(2); what is mapped isn't counted)."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--node", type=int, default=8)
    given = parser.parse_args()
    shared, folder = given.shared.resolve(), given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{given.node} ranks of a node, of {given.ranks}")
    print(
        "| samples | start s (slowest rank) | read MB a rank | open files a rank | own MB a rank | own MB a node | mapped MB |"
    )
    print("|-:|-:|-:|-:|-:|-:|-:|")
    for count in given.counts:
        store = make_store(shared, folder, count)
        commands = [
            [sys.executable, __file__, "--measure", str(store), str(shared), str(r), str(given.ranks)]
            for r in range(given.node)
        ]
        running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
        found = [json.loads(process.communicate()[0]) for process in running]
        own = [f["own"] / 1e6 for f in found]
        print(
            f"| {count:,} | {max(f['seconds'] for f in found):.2f} | {max(f['read'] for f in found) / 1e6:.2f} | "
            f"{max(f['files'] for f in found)} | {max(own):.1f} | {sum(own):.1f} | {max(f['mapped'] for f in found) / 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))))
    else:
        main()
