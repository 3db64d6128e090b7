"""llava-tune prepare CFG --save-folder DIR"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_tune.cli.options import FlatRun, parse
from llava_tune.cli.progress import Bar
from llava_tune.errors import InputError

if TYPE_CHECKING:
    from llava_tune.data.preparation import Prepared, Progress

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
    from llava_tune.data.preparation import finalize, prepare
    from llava_tune.data.shards import parse_shard, slurm_shard

    run = options.run
    started = time.monotonic()
    shard = parse_shard(options.shard) if options.shard else slurm_shard()
    if options.finalize:
        done = finalize(run, folder, skip=options.skip)
    else:
        name = str(folder) + (f" (shard {shard})" if shard.count > 1 else "")
        with Bar(f"preparing {name}") as bar:

            def report(progress: Progress) -> None:
                bar.update(progress.bytes, progress.total_bytes, f"{progress.samples:,} samples")

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
