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


def main(arguments: list[str]) -> None:
    """Prepare, and say what was done."""
    _, options = parse(Options, arguments, "prepare", DESCRIPTION)
    if options.save_folder is None:
        raise InputError("prepare needs --save-folder DIR: where the prepared data goes")
    prepare_and_report(options.run, Path(options.save_folder))


def prepare_and_report(run: FlatRun, folder: Path) -> Prepared:
    """`prepare` with a progress bar or plain lines, and a summary."""
    from llava_tune.data.prepare import prepare

    started = time.monotonic()
    with _Bar(str(folder)) as report:
        done = prepare(run, folder, report=report)
    seconds = time.monotonic() - started
    if done.was_there:
        print(f"{folder} is prepared already and fits: {done.samples:,} samples, {done.tokens:,} tokens")
        return done
    print(
        f"{done.samples:,} samples, {done.tokens:,} tokens ({done.supervised:,} supervised) in {seconds:.1f} s, encoder "
        f"{done.encoder}: {folder}"
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
