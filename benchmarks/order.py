"""Going on at a late step of a large data set: seconds from a new process's order to its first batch.

python benchmarks/order.py [--records 10000000] [--step 1000000]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from llava_tune.data.order import BatchOrder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--step", type=int, default=1_000_000)
    options = parser.parse_args()
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, options.records), 8, 2048).astype(np.int32)
    print("| order | global batch | epoch of the step | seconds to the first batch |\n|-|-:|-:|-:|")
    for name, batch, pack in (("grouped by length", 128, None), ("grouped by length", 8, None), ("packed", 128, 2048)):
        started = time.monotonic()
        order = BatchOrder(
            lengths,
            seed=1,
            global_batch_size=batch,
            micro_batch_size=1,
            group_by_length=True,
            pack_length=pack,
            world_size=8,
            rank=3,
            start_step=options.step,
            total_steps=options.step + 10,
        )
        next(iter(order))
        took = time.monotonic() - started
        print(f"| {name} | {batch} | {options.step // order.steps_per_epoch} | {took:.2f} |")


if __name__ == "__main__":
    main()
