"""Peak memory of the loss of one step: ours over chunks of supervised positions, against plain cross entropy over all.

python benchmarks/loss.py [--tokens 8192] [--vocabulary 92544] [--width 512] [--supervised 1.0]

Each way runs in a process of its own, forward and backward; --dtype bfloat16 takes ten minutes on a CPU without matrix units for it.
What is counted is the process's peak above what it held before the loss (hidden states and the head's weight).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

from llava_tune.model.loss import supervised_loss


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits of every position in fp32, as transformers' causal LM loss makes them."""
    logits = (hidden @ weight.T).float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def one(way: str, dtype: torch.dtype, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, options.tokens, options.width, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(options.vocabulary, options.width, dtype=dtype) * 0.02)
    labels = torch.randint(0, options.vocabulary, (1, options.tokens))
    labels[:, : int(options.tokens * (1 - options.supervised))] = -100
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    loss = (supervised_loss if way == "ours" else plain)(hidden, weight, labels)
    loss.backward()
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) * 1024 / 1e9, seconds, loss.item() / options.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=92544)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--supervised", type=float, default=1.0)
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--one", nargs=2)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], getattr(torch, options.one[1]), options)
        return
    print("| precision | plain, GB | ours, GB | share | plain, s | ours, s | loss, plain | loss, ours |")
    print("|-|-:|-:|-:|-:|-:|-:|-:|")
    for dtype in options.dtype:
        found = {}
        for way in ("plain", "ours"):
            command = [sys.executable, *sys.argv, "--one", way, dtype]
            found[way] = [float(x) for x in subprocess.check_output(command, text=True).split()]
        (a, b, c), (d, e, f) = found["plain"], found["ours"]
        print(f"| {dtype} | {a:.2f} | {d:.2f} | {d / a:.1%} | {b:.1f} | {e:.1f} | {c:.4f} | {f:.4f} |")


if __name__ == "__main__":
    main()
