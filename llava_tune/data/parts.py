"""One part of a store: a span of a source, read, checked, tokenized and written; what a worker process does."""

from __future__ import annotations

import functools
import gc
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llava_tune.data.formats import Convert, converter
from llava_tune.data.plain import RawRecord, plain_records
from llava_tune.data.records import BadRecord, Record, parse_record
from llava_tune.data.sources import BadRow, Chunk, Source, Span, open_source
from llava_tune.data.store import PARTS, file_hash, part_name, part_writer, to_arrow
from llava_tune.data.tokens.layout import Layout, LayoutSpec, TokenizedBatch, merge
from llava_tune.data.tokens.templates import Template
from llava_tune.paths import whole_file

BATCH_RECORDS = 4096
"""Records tokenized in one call, and rows of one Arrow record batch."""


@dataclass(frozen=True)
class DataSet:
    """What a worker needs of one data set.

    Attributes:
        layout: how its records become tokens.
        format, convert: how a record is read (llava_tune/data/formats.py).
    """

    layout: LayoutSpec
    format: str
    convert: str | None


SKIPPED = "skipped by --skip"


@dataclass(frozen=True)
class Job:
    """All that a worker needs.

    Attributes:
        folder: the store's.
        sets: the data sets.
        files: each source file with the index of its data set.
        skip: ids of records to leave out.
    """

    folder: Path
    sets: tuple[DataSet, ...]
    files: tuple[tuple[Path, int], ...]
    skip: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Task:
    """One part: its number in the store, and a span of a file."""

    index: int
    file: int
    span: Span


class Worker:
    """Writes parts. A job has one tokenizer; its layouts share the encoder, which is slow to build."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._layouts: dict[Template, Layout] = {}
        self.source = functools.lru_cache(maxsize=4)(open_source)

    def layout(self, spec: LayoutSpec) -> Layout:
        if spec.template not in self._layouts:
            encoder = next((x.encoder for x in self._layouts.values()), None)
            self._layouts[spec.template] = Layout(spec, encoder)
        return self._layouts[spec.template]

    def write(self, task: Task) -> dict[str, Any]:
        """Write a part and then its facts. Returns the facts."""
        path, set_index = self.job.files[task.file]
        data = self.job.sets[set_index]
        layout = self.layout(data.layout)
        source = self.source(path)
        part = Part(task, source, layout, self.job.skip)
        chunk = source.read(task.span)
        records = part.records(chunk, converter(data.format, data.convert))
        with part_writer(self.job.folder, task.index) as writer:
            for start in range(0, len(records), BATCH_RECORDS):
                writer.write_batch(to_arrow(part.tokenize(records[start : start + BATCH_RECORDS], start)))
        written = self.job.folder / part_name(task.index)
        facts = {
            "file": written.name,
            "source": task.file,
            "span": [task.span.start, task.span.end],
            "bytes": written.stat().st_size,
            "xxh3": file_hash(written),
            "units": chunk.units,
            "fixes": part.fixes,
            "left_out": part.listed(chunk),
            "encoder": layout.encoder.name,
            **part.counts,
        }
        with whole_file(facts_path(self.job.folder, task.index), durable=False) as beside:
            beside.write_text(json.dumps(facts))
        return facts


class Part:
    """The records of one part on their way through, and what is noted about them."""

    def __init__(self, task: Task, source: Source, layout: Layout, skip: frozenset[str]) -> None:
        self.task, self.source, self.layout, self.skip = task, source, layout, skip
        self.counts = {"samples": 0, "images": 0, "tokens": 0, "supervised": 0, "truncated": 0, "truncated_tokens": 0}
        self.fixes: dict[str, int] = {}
        self.left_out: list[tuple[int, str, str]] = []  # index of the record in the part, id, why
        self._places: list[int] | None = None  # line or row of each record in the part, where they were needed

    def records(self, chunk: Chunk, convert: Convert | None) -> Sequence[RawRecord | Record | None]:
        """The part's records: typed all at once if they are all of the common kind, else one by one; None for a bad one."""
        typed = chunk.typed() if convert is None else None
        if typed is not None:
            return typed
        places: list[int] = []
        records: list[RawRecord | Record | None] = []
        for place, row in chunk.rows():
            places.append(place)
            records.append(self._one(len(records), row, convert))
        self._places = places
        return records

    def _one(self, index: int, row: Any, convert: Convert | None) -> RawRecord | Record | None:
        try:
            if isinstance(row, BadRow):
                raise BadRecord(str(row))
            if convert is not None:
                row = _converted(convert, row)
                if row is None:
                    self._fix("left out by dataset.convert")
                    return None
            try:
                return msgspec.convert(row, RawRecord)
            except (msgspec.ValidationError, RecursionError):
                return parse_record(row, self.name(index))
        except BadRecord as error:
            identity = row.get("id") if isinstance(row, dict) else None
            self.left_out.append((index, self.name(index) if identity is None else str(identity), str(error)))
            return None

    def tokenize(self, records: Sequence[RawRecord | Record | None], start: int) -> TokenizedBatch:
        """Samples of some records, the first of which is number `start` of the part."""
        typed = [(i, r) for i, r in enumerate(records) if type(r) is RawRecord]
        plain = plain_records([r for _, r in typed], self.layout.spec.image_position)
        numbers = np.array([i for i, _ in typed], np.int64)
        odd: list[tuple[int, Record]] = [(i, r) for i, r in enumerate(records) if isinstance(r, Record)]
        for k in plain.odd.tolist():
            i, raw = typed[k]
            try:
                odd.append((i, parse_record(raw.as_dict(), self.name(start + i))))
            except BadRecord as error:
                self.left_out.append((start + i, self.id_of(raw, start + i), str(error)))
        rows = numbers[plain.rows]
        ids = [
            self.name(start + i) if given is None else given for given, i in zip(plain.ids, rows.tolist(), strict=True)
        ]
        batch = self._numbered(self.layout.tokenize_plain(plain, ids), rows)
        if odd:
            odd.sort(key=lambda pair: pair[0])
            for _, record in odd:
                for fix in record.fixes:
                    self._fix(fix)
            rest = self.layout.tokenize([record for _, record in odd])
            batch = merge(batch, self._numbered(rest, np.array([i for i, _ in odd])))
        self.left_out += [(start + i, self.id_of(records[i], start + i), why) for i, why in batch.unsupervised]
        if self.skip:
            batch = self._without_skipped(batch, start)
        self._count(batch)
        return batch

    @staticmethod
    def _numbered(batch: TokenizedBatch, rows: np.ndarray) -> TokenizedBatch:
        """The batch with its rows counted among all records, not only those of one kind."""
        batch.unsupervised = [(int(rows[i]), why) for i, why in batch.unsupervised]
        batch.cut = [(int(rows[i]), tokens, lost) for i, tokens, lost in batch.cut]
        batch.rows = rows[batch.rows]
        return batch

    def _without_skipped(self, batch: TokenizedBatch, start: int) -> TokenizedBatch:
        keep = np.ones(len(batch.ids), bool)
        for k, (identity, row) in enumerate(zip(batch.ids, batch.rows.tolist(), strict=True)):
            if identity in self.skip:
                keep[k] = False
                self.left_out.append((start + row, identity, SKIPPED))
        return batch if keep.all() else batch.keep(keep)

    def _count(self, batch: TokenizedBatch) -> None:
        counts = self.counts
        counts["samples"] += len(batch.ids)
        counts["images"] += sum(map(len, batch.images))
        counts["tokens"] += int(batch.lengths.sum())
        counts["supervised"] += int(np.count_nonzero(batch.labels >= 0))
        counts["truncated"] += len(batch.cut)
        counts["truncated_tokens"] += sum(lost for _, _, lost in batch.cut)

    def name(self, index: int) -> str:
        """What a record without an id is called."""
        return f"part {self.task.index} record {index}"

    def id_of(self, record: RawRecord | Record | None, index: int) -> str:
        identity = record.id if record is not None else None
        return self.name(index) if identity is None else str(identity)

    def _fix(self, what: str) -> None:
        self.fixes[what] = self.fixes.get(what, 0) + 1

    def places(self, chunk: Chunk) -> list[int]:
        """The line or row of each record within the part, from 0."""
        return self._places if self._places is not None else [place for place, _ in chunk.rows()]

    def listed(self, chunk: Chunk) -> list[dict[str, Any]]:
        """What was left out, with the line or row (from 0, within the part) of each."""
        if not self.left_out:
            return []
        places = self.places(chunk)
        return [
            {"id": identity, self.source.unit: places[index], "reason": SKIPPED if identity in self.skip else why}
            for index, identity, why in sorted(self.left_out)
        ]


def _converted(convert: Convert, row: Any) -> Any:
    try:
        return convert(row)
    except BadRecord:
        raise
    except Exception as error:
        raise BadRecord(f"converting it failed: {type(error).__name__}: {error}") from error


def facts_path(folder: Path, index: int) -> Path:
    """Where the facts of a written part are, until the store is finished."""
    return folder / PARTS / f"{index:05d}.json"


def part_facts(folder: Path, task: Task) -> dict[str, Any] | None:
    """The facts of a part that is written already, or None."""
    try:
        facts: dict[str, Any] = json.loads(facts_path(folder, task.index).read_bytes())
    except (FileNotFoundError, ValueError):  # a ValueError: the machine crashed before its content was on disk
        return None
    same = facts["span"] == [task.span.start, task.span.end] and facts["source"] == task.file
    return facts if same and (folder / facts["file"]).is_file() else None


_worker: Worker | None = None
_thread: ThreadPoolExecutor | None = None
"""The thread that works in a worker process. The main thread would fill the holes of the heap that the process was forked with,
page by page, until none is shared any more; another thread has a heap of its own."""


def build_worker(job: Job) -> None:
    """Build this process's worker; what is forked from this process has it, too."""
    global _worker
    os.environ["RAYON_NUM_THREADS"] = "1"  # one thread for each worker; with more, what is forked would miss them
    _worker = Worker(job)
    for data in job.sets:
        _worker.layout(data.layout)


def start_worker(job: Job) -> None:
    """Begin a worker process."""
    global _thread
    _thread = ThreadPoolExecutor(1)
    gc.disable()  # records are trees without cycles; the collector would walk them again and again
    if _worker is None or _worker.job != job:
        build_worker(job)


def this_worker() -> Worker:
    """The worker of this process."""
    assert _worker is not None, "the pool's initializer runs first"
    return _worker


def work(task: Task) -> dict[str, Any]:
    """Write a part in a worker process."""
    assert _thread is not None, "the pool's initializer runs first"
    facts = _thread.submit(this_worker().write, task).result()
    gc.collect()  # the little that had cycles; what there was before the fork is frozen
    return facts


def rows_of(source: Source, format: str, convert: str | None) -> Iterator[tuple[int, Any]]:
    """(line or row from 1, the record as LLaVA's or a BadRow) of every record of a source, one by one."""
    change = converter(format, convert)
    first = 1
    for span in source.spans():
        chunk = source.read(span)
        for place, row in chunk.rows():
            if change is not None and not isinstance(row, BadRow):
                try:
                    row = _converted(change, row)
                except BadRecord as error:
                    row = BadRow(str(error))
            yield first + place, row
        first += chunk.units
