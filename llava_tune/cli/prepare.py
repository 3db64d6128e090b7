"""llava-tune prepare CFG --save-folder DIR"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_tune.cli.options import FlatRun, parse
from llava_tune.errors import InputError

if TYPE_CHECKING:
    from llava_tune.data.prepare import Prepared, Progress, Reporter

DESCRIPTION = "Tokenize a config's data into a folder that training opens at once (offline_processed_text_folder)."


@dataclass
class Options:
    run: FlatRun
    save_folder: str | None = None
    """Where the prepared data goes (needed)."""
    num_proc: int | None = None
    """Processes; unset: dataset.num_proc."""
    shard: str | None = None
    """I/N: write only the I-th of N shares of the parts; the last share to end finishes the store. Under `srun` or in a Slurm array
    the share is taken from Slurm's variables."""
    finalize: bool = False
    """Only finish the store: all its parts must be there."""
    modified_config: bool = False
    """Also write <config>_modified.py, which trains from the result; beside the config, or here for a shipped one."""
    skip: str | None = None
    """A JSONL file of bad records (left_out.jsonl, quarantine.jsonl, or what `doctor` wrote): their ids are left out."""


def main(arguments: list[str]) -> None:
    """Prepare, and say what was done."""
    config, options = parse(Options, arguments, "prepare", DESCRIPTION)
    if options.save_folder is None:
        raise InputError("prepare needs --save-folder DIR: where the prepared data goes")
    done = prepare_and_report(options, Path(options.save_folder))
    if options.modified_config and not done.missing:
        from llava_tune.config import write_modified

        print(f"a config that trains from it: {write_modified(config, options.run, done.folder)}")


def prepare_and_report(options: Options, folder: Path) -> Prepared:
    """`prepare` with a progress bar or plain lines, and a summary."""
    from llava_tune.data.prepare import finalize, prepare
    from llava_tune.data.shards import parse_shard, slurm_shard

    run = options.run
    started = time.monotonic()
    shard = parse_shard(options.shard) if options.shard else slurm_shard()
    if options.finalize:
        done = finalize(run, folder, skip=options.skip)
    else:
        name = str(folder) + (f" (shard {shard})" if shard.count > 1 else "")
        with _Bar(name) as report:
            done = prepare(run, folder, num_proc=options.num_proc, shard=shard, skip=options.skip, report=report)
    seconds = time.monotonic() - started
    if done.was_there:
        print(f"{folder} is prepared already and fits: {done.samples:,} samples, {done.tokens:,} tokens")
        return done
    if done.missing:
        print(
            f"shard {shard} is done in {seconds:.1f} s: {done.samples:,} samples so far; {done.missing:,} parts are still to come "
            f"from other shards. The last one finishes {folder}; or, when all have ended: `--finalize`"
        )
        return done
    print(
        f"{done.samples:,} samples, {done.tokens:,} tokens ({done.supervised:,} supervised) in {seconds:.1f} s, encoder "
        f"{done.encoder}: {folder}"
    )
    if len(done.data_sets) > 1:
        for data in done.data_sets:
            print(
                f"  {data['name']}: {data['samples']:,} samples, {data['tokens']:,} tokens, {data['images']:,} images"
            )
    if done.truncated:
        print(f"{done.truncated:,} samples were cut to max_length {run.dataset.max_length}")
    for fix, count in done.fixes.items():
        print(f"{count:,} records: {fix}")
    if done.left_out:
        print(f"{done.left_out:,} records were left out, each with its reason in {folder / 'left_out.jsonl'}")
    return done


class _Bar:
    """A rich bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.last = time.monotonic()

    def __enter__(self) -> Reporter:
        if not sys.stderr.isatty():
            return self._line
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("preparing"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("", total=None, text="")
        self.bar.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()

    def _update(self, progress: Progress) -> None:
        text = f"{progress.samples:,} samples"
        self.bar.update(self.task, total=progress.total_bytes, completed=progress.bytes, text=text)

    def _line(self, progress: Progress) -> None:
        if time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            share = progress.bytes / max(progress.total_bytes, 1)
            print(f"preparing {self.what}: {share:.0%}, {progress.samples:,} samples", file=sys.stderr, flush=True)
