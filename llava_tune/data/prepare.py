"""Source files to a store: parts in parallel, each whole or absent, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_tune.config import Run
from llava_tune.data.layout import Layout, LayoutSpec
from llava_tune.data.parts import Job, part_facts, start_worker, work, write_part
from llava_tune.data.sources import Source, Span
from llava_tune.data.store import (
    FORMAT_VERSION,
    LEFT_OUT,
    MANIFEST,
    PARTS,
    StoreSpec,
    check_source,
    check_spec,
    read_manifest,
    write_manifest,
)
from llava_tune.data.templates import get_template
from llava_tune.data.tokenizer import load_vocabulary
from llava_tune.errors import InputError
from llava_tune.paths import write_whole


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did."""

    folder: Path
    samples: int
    tokens: int
    supervised: int
    left_out: int
    truncated: int
    fixes: dict[str, int]
    encoder: str
    was_there: bool = False


@dataclass(frozen=True)
class Plan:
    """A run's data settings, resolved: what to read and how to lay it out."""

    source: Path | None
    layout: LayoutSpec
    spec: StoreSpec
    max_bad_share: float
    num_proc: int


@dataclass
class Progress:
    """Bytes read of the source, and samples written; handed to a reporter."""

    total_bytes: int
    bytes: int = 0
    samples: int = 0
    left_out: int = 0


Reporter = Callable[[Progress], None]


def make_layout(run: Run) -> tuple[LayoutSpec, str]:
    """Resolve tokenizer, template and the tokens of an image; with the tokenizer's fingerprint.

    Raises:
        InputError: any of them doesn't exist or doesn't fit.
    """
    from llava_tune.model.tokens import image_tokens

    data = run.dataset
    template = get_template(data.template)
    vocabulary = load_vocabulary(run.model.llm.tokenizer or run.model.llm.name)
    patches = image_tokens(run.model.vision)
    return LayoutSpec.of(vocabulary, template, data.max_length, patches, data.image_position), vocabulary.fingerprint()


def make_plan(run: Run) -> Plan:
    """Resolve what `prepare` needs.

    Raises:
        InputError: the image folder is missing, or see `make_layout`.
    """
    data = run.dataset
    if data.image_folder is not None and not Path(data.image_folder).is_dir():
        raise InputError(
            f"dataset.image_folder {data.image_folder}: no such folder. Records name their images relative to it"
        )
    layout, fingerprint = make_layout(run)
    spec = StoreSpec(
        tokenizer=fingerprint,
        template=layout.template.name,
        template_hash=hashlib.sha256(repr(layout.template).encode()).hexdigest(),
        max_length=data.max_length,
        image_tokens=layout.image_tokens,
        image_position=data.image_position,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Plan(
        Path(data.data_path) if data.data_path else None, layout, spec, data.max_bad_share, data.num_proc or cores
    )


def prepare(
    run: Run, save_folder: str | Path, *, num_proc: int | None = None, report: Reporter | None = None
) -> Prepared:
    """Tokenize a run's data into `save_folder`.

    A finished store that fits is left as it is; an unfinished one is gone on with; one of other settings is refused.

    Args:
        run: the config; `dataset.data_path` is read.
        save_folder: where the store goes; made if missing.
        num_proc: processes; None: as the config says.
        report: called with the Progress now and then.

    Raises:
        InputError: the input is wrong, or more than `dataset.max_bad_share` of the records are.
    """
    plan = make_plan(run)
    return prepare_plan(plan, Path(save_folder), num_proc=num_proc, report=report)


def prepare_plan(plan: Plan, folder: Path, *, num_proc: int | None = None, report: Reporter | None = None) -> Prepared:
    """`prepare` for a plan that is made already."""
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        check_spec(folder, manifest, plan.spec)
        if plan.source is not None:
            check_source(folder, manifest, plan.source)
        return _prepared(folder, manifest, was_there=True)
    if plan.source is None:
        raise InputError(
            "dataset.data_path is not set: there is nothing to prepare from. Set it to a LLaVA JSON or JSONL file"
        )
    source = Source(plan.source)
    _begin(folder, plan, source)
    progress = Progress(source.bytes)
    parts = _write_parts(plan, folder, source, num_proc or plan.num_proc, progress, report or (lambda _: None))
    manifest = _finish(folder, plan, source, parts)
    return _prepared(folder, manifest)


def _begin(folder: Path, plan: Plan, source: Source) -> None:
    """Claim `folder` for this plan and source, or go on in it.

    Raises:
        InputError: it holds something else.
    """
    identity = {"spec": asdict(plan.spec), "source": [source.path.name, source.bytes, source.mtime_ns]}
    marker = folder / PARTS / "plan.json"
    if marker.is_file():
        found = json.loads(marker.read_bytes())
        if found == identity:
            return
        check_spec(folder, found, plan.spec)
        raise InputError(
            f"{folder} holds an unfinished store of {found['source'][0]} ({found['source'][1]:,} bytes), which is not "
            f"{source.path} as it is now. Remove the folder, or choose another"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no store; nothing was changed. Choose a new folder")
    write_whole(marker, json.dumps(identity))


def _write_parts(
    plan: Plan, folder: Path, source: Source, num_proc: int, progress: Progress, report: Reporter
) -> list[dict[str, Any]]:
    """Write the parts that aren't there yet. Returns the facts of all, in order."""
    facts: dict[int, dict[str, Any]] = {}

    def done(span: Span, result: dict[str, Any]) -> None:
        facts[span.index] = result
        progress.bytes += span.end - span.start
        progress.samples += result["samples"]
        progress.left_out += len(result["left_out"])
        report(progress)

    def missing() -> Iterable[Span]:
        for span in source.spans():
            if (known := part_facts(folder, span)) is not None:
                done(span, known)
            else:
                yield span

    job = Job(source.path, source.format, folder)
    if num_proc == 1 or source.bytes < source.part_bytes:
        layout = Layout(plan.layout)
        for span in missing():
            done(span, write_part(layout, job, span))
    else:
        _write_parallel(plan.layout, job, missing(), num_proc, done)
    return [facts[i] for i in sorted(facts)]


def _write_parallel(
    layout: LayoutSpec, job: Job, spans: Iterable[Span], num_proc: int, done: Callable[[Span, dict[str, Any]], None]
) -> None:
    pool = ProcessPoolExecutor(
        num_proc, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(layout, job)
    )
    waiting: dict[Future[dict[str, Any]], Span] = {}

    def collect(most: int) -> None:
        while len(waiting) > most:
            ready, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                done(waiting.pop(future), future.result())

    try:
        for span in spans:
            waiting[pool.submit(work, span)] = span
            collect(2 * num_proc)
        collect(0)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed (often: out of memory). The finished parts are kept; run the same command again, "
            "with a smaller --num-proc if it is memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finish(folder: Path, plan: Plan, source: Source, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the list of what was left out and the manifest; remove what only an unfinished store needs.

    Raises:
        InputError: too many records are bad, or none is good.
    """
    line = 1
    left_out: list[dict[str, Any]] = []
    fixes: dict[str, int] = {}
    for part in parts:
        for entry in part["left_out"]:
            left_out.append({**entry, "line": line + entry["line"]} if "line" in entry else entry)
        for fix, n in part["fixes"].items():
            fixes[fix] = fixes.get(fix, 0) + n
        line += part["lines"]
    samples = sum(p["samples"] for p in parts)
    write_whole(folder / LEFT_OUT, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in left_out))
    _refuse_if_bad(folder, plan, samples, left_out)
    totals = {key: sum(p[key] for p in parts) for key in ("images", "tokens", "supervised", "truncated")}
    manifest = {
        "format_version": FORMAT_VERSION,
        "spec": asdict(plan.spec),
        "sources": [asdict(source.facts())],
        "samples": samples,
        **totals,
        "left_out": len(left_out),
        "fixes": fixes,
        "encoder": sorted({p["encoder"] for p in parts}),
        "parts": [{k: p[k] for k in ("file", "samples", "bytes", "xxh3")} for p in parts],
    }
    write_manifest(folder, manifest, [p["file"] for p in parts])
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    for beside in folder.glob(".*.tmp"):  # what a killed run left half-written
        beside.unlink(missing_ok=True)
    return manifest


def _refuse_if_bad(folder: Path, plan: Plan, samples: int, left_out: list[dict[str, Any]]) -> None:
    total = samples + len(left_out)
    if not total:
        raise InputError(f"{plan.source}: holds no record")
    share = len(left_out) / total
    if samples and share <= plan.max_bad_share:
        return
    examples = "; ".join(f"{_where(e)}: {e['reason']}" for e in left_out[:3])
    raise InputError(
        f"{plan.source}: {len(left_out):,} of {total:,} records ({share:.1%}) are bad, more than dataset.max_bad_share "
        f"({plan.max_bad_share:.1%}). {examples}. All are listed in {folder / LEFT_OUT}. Mend them, or raise max_bad_share"
    )


def _where(entry: dict[str, Any]) -> str:
    line = f"line {entry['line']}" if "line" in entry else ""
    return ", ".join(x for x in (f"id {entry['id']}" if entry["id"] else "", line) if x)


def _prepared(folder: Path, manifest: dict[str, Any], was_there: bool = False) -> Prepared:
    names = ("samples", "tokens", "supervised", "left_out", "truncated", "fixes")
    encoder = "+".join(manifest["encoder"])
    return Prepared(folder=folder, encoder=encoder, was_there=was_there, **{n: manifest[n] for n in names})
