"""One part of a store: a span of a source, read, checked, tokenized and written; what a worker process does."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llava_tune.data.layout import Layout, LayoutSpec
from llava_tune.data.records import BadRecord, Record, parse_record
from llava_tune.data.sources import Format, Span, read_span, split_records
from llava_tune.data.store import PARTS, file_hash, part_name, part_writer, to_arrow
from llava_tune.paths import write_whole

BATCH_RECORDS = 4096
"""Records tokenized in one call, and rows of one Arrow record batch."""


@dataclass(frozen=True)
class Job:
    """What a worker needs beside the layout."""

    path: Path
    format: Format
    folder: Path


_worker: tuple[Layout, Job] | None = None


def start_worker(spec: LayoutSpec, job: Job) -> None:
    global _worker
    os.environ["RAYON_NUM_THREADS"] = "1"
    gc.disable()  # records are trees without cycles; the collector would walk them again and again
    _worker = Layout(spec), job


def work(span: Span) -> dict[str, Any]:
    assert _worker is not None, "the pool's initializer runs first"
    return write_part(*_worker, span)


def _facts_path(folder: Path, index: int) -> Path:
    return folder / PARTS / f"{index:05d}.json"


def part_facts(folder: Path, span: Span) -> dict[str, Any] | None:
    """The facts of a part that is written already, or None."""
    path = _facts_path(folder, span.index)
    if not path.is_file():
        return None
    facts: dict[str, Any] = json.loads(path.read_bytes())
    return facts if facts["span"] == [span.start, span.end] and (folder / facts["file"]).is_file() else None


def write_part(layout: Layout, job: Job, span: Span) -> dict[str, Any]:
    text = read_span(job.path, span)
    left_out: list[dict[str, Any]] = []
    counts = {"samples": 0, "images": 0, "tokens": 0, "supervised": 0, "truncated": 0}
    fixes: dict[str, int] = {}
    with part_writer(job.folder, span.index) as writer:
        records = _parse(text, job.format, span.index, left_out)
        for start in range(0, len(records), BATCH_RECORDS):
            some = records[start : start + BATCH_RECORDS]
            batch = layout.tokenize(some)
            left_out += [{"id": some[i].id, "reason": why} for i, why in batch.unsupervised]
            for record in some:
                for fix in record.fixes:
                    fixes[fix] = fixes.get(fix, 0) + 1
            counts["samples"] += len(batch.ids)
            counts["images"] += sum(map(len, batch.images))
            counts["tokens"] += int(batch.lengths.sum())
            counts["supervised"] += int((batch.labels >= 0).sum())
            counts["truncated"] += batch.truncated
            writer.write_batch(to_arrow(batch))
    path = job.folder / part_name(span.index)
    facts = {
        "file": path.name,
        "span": [span.start, span.end],
        "bytes": path.stat().st_size,
        "xxh3": file_hash(path),
        "lines": text.count(b"\n"),
        "fixes": fixes,
        "left_out": left_out,
        "encoder": layout.encoder.name,
        **counts,
    }
    write_whole(_facts_path(job.folder, span.index), json.dumps(facts))
    return facts


def _parse(text: bytes, format: Format, part: int, left_out: list[dict[str, Any]]) -> list[Record]:
    """The good records of a span; the bad ones go to `left_out` with their line and reason."""
    body = text.strip(b", \t\r\n") if format == "json" else text.strip().replace(b"\n", b",")
    try:
        raws = orjson.loads(b"[" + body + b"]")
        lines = None
    except orjson.JSONDecodeError:
        raws, lines = _parse_one_by_one(text, format, left_out)
    records = []
    bad = []
    for k, raw in enumerate(raws):
        try:
            records.append(parse_record(raw, f"part {part} record {k}"))
        except BadRecord as error:
            bad.append((k, str(raw.get("id", "")) if isinstance(raw, dict) else "", str(error)))
    if bad:
        lines = lines or [line for line, _ in split_records(text, format)]
        left_out += [{"id": identity, "line": lines[k], "reason": why} for k, identity, why in bad]
    return records


def _parse_one_by_one(text: bytes, format: Format, left_out: list[dict[str, Any]]) -> tuple[list[Any], list[int]]:
    raws, lines = [], []
    for line, raw in split_records(text, format):
        try:
            raws.append(orjson.loads(raw))
            lines.append(line)
        except orjson.JSONDecodeError as error:
            left_out.append({"id": "", "line": line, "reason": f"not valid JSON: {error}"})
    return raws, lines
