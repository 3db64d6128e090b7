"""llava-tune doctor CFG"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_tune.cli.options import FlatRun, parse
from llava_tune.cli.progress import Bar
from llava_tune.errors import EXIT_RUN_FAILED

if TYPE_CHECKING:
    from llava_tune.data.review.doctor import Report

DESCRIPTION = "Read every record and image of a config before a long run, and say what would harm it. Exit code 1 if anything would."


@dataclass
class Options:
    run: FlatRun
    quick: bool = False
    """Read only the images' headers, not their pixels."""
    model: bool = True
    """Also see whether the model can be built, and how much room its checkpoints need."""
    num_proc: int | None = None
    """Processes; unset: dataset.num_proc."""
    json: str | None = None
    """Also write the report as JSON to this file."""
    list: str | None = None
    """Also write every record that would take no part to this JSONL file, with its reason: what `prepare --skip` reads."""


def main(arguments: list[str]) -> None:
    """Examine, and print a table."""
    _, options = parse(Options, arguments, "doctor", DESCRIPTION)
    from llava_tune.data.review.doctor import examine_run
    from llava_tune.paths import write_whole

    with Bar("examining") as bar:

        def report(done: int, total: int, found: int) -> None:
            bar.update(done, total, f"{found:,} findings")

        result = examine_run(
            options.run, quick=options.quick, model=options.model, num_proc=options.num_proc, report=report
        )
    if options.json:
        write_whole(Path(options.json), json.dumps(result.as_json(), indent=1, ensure_ascii=False))
    if options.list:
        write_whole(Path(options.list), "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in result.bad))
    _print(result, options)
    if result.harmful:
        raise SystemExit(EXIT_RUN_FAILED)


def _print(result: Report, options: Options) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from llava_tune.data.review.findings import KINDS

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{result.records:,} records, {result.images:,} images{' (headers only)' if options.quick else ''}, {result.tokens:,} tokens, "
        f"{result.supervised:,} of them supervised"
    )
    if result.sizes:
        sizes = sorted(result.sizes.items(), key=lambda item: int(item[0].split("-")[0]))
        console.print("images by longer side: " + ", ".join(f"{name} px: {count:,}" for name, count in sizes))
    if result.supervised_lost:
        console.print(
            f"max_length {options.run.dataset.max_length} cuts off {result.supervised_lost:,} supervised tokens"
        )
    if not result.findings:
        console.print("nothing was found that would harm the run")
        return
    colors = {"error": "red", "warning": "yellow", "note": "cyan"}
    table = Table("", "count", "what", "for example", "what to do", show_lines=True)
    for finding in result.findings:
        kind = KINDS[finding.kind]
        shown = "\n".join(_example(e) for e in finding.examples[:3])
        more = f"\n… and {finding.count - 3:,} more" if finding.count > 3 else ""
        severity = f"[{colors[finding.severity]}]{finding.severity}[/]"
        table.add_row(severity, f"{finding.count:,}", kind.what, escape(shown + more), kind.advice)
    console.print(table)
    if result.lost:
        share = result.lost / max(result.records, 1)
        allowed = options.run.dataset.max_bad_share
        verdict = "more than" if share > allowed else "within"
        console.print(
            f"{result.lost:,} of {result.records:,} records ({share:.2%}) would take no part, {verdict} dataset.max_bad_share "
            f"({allowed:.2%})"
        )
    if result.bad and not options.list:
        console.print("--list FILE writes them all; `llava-tune prepare CFG --skip FILE` leaves them out")


def _example(example: dict[str, object]) -> str:
    place = [f"{unit} {example[unit]}" for unit in ("line", "row", "sample", "record") if unit in example]
    identity = [f"id {example['id']}"] if example.get("id") else []
    image = [str(example["image"])] if "image" in example else []
    where = ", ".join([str(example.get("source", "")), *place, *identity, *image])
    return f"{where}: {example['reason']}" if example.get("reason") else where
