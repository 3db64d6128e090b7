"""Source files to a store: parts in parallel, each whole or absent, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llava_tune.config import Run
from llava_tune.data import pool
from llava_tune.data.parts import SKIPPED, DataSet, Job, Task, Worker, part_facts, work
from llava_tune.data.plan import Plan, check_plan, make_plan
from llava_tune.data.shards import Shard
from llava_tune.data.sources import Source, Span
from llava_tune.data.sources.text import TextSource
from llava_tune.data.store import (
    FORMAT_VERSION,
    LEFT_OUT,
    MANIFEST,
    PARTS,
    check_spec,
    read_manifest,
    write_manifest,
)
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
    data_sets: list[dict[str, Any]] = field(default_factory=list)
    was_there: bool = False
    missing: int = 0
    """Parts that other shards have still to write; 0: the store is finished."""

    @staticmethod
    def unfinished(folder: Path, parts: list[dict[str, Any]], missing: int) -> Prepared:
        """What there is while other shards are at work."""
        sums = _sums(parts)
        return Prepared(
            folder=folder,
            samples=sums["samples"],
            tokens=sums["tokens"],
            supervised=sums["supervised"],
            truncated=sums["truncated"],
            left_out=sum(len(p["left_out"]) for p in parts),
            fixes={},
            encoder="",
            missing=missing,
        )


@dataclass
class Progress:
    """Bytes read of the source, and samples written; handed to a reporter."""

    total_bytes: int
    bytes: int = 0
    samples: int = 0
    left_out: int = 0


Reporter = Callable[[Progress], None]


def prepare(
    run: Run,
    save_folder: str | Path,
    *,
    num_proc: int | None = None,
    shard: Shard | None = None,
    skip: str | Path | None = None,
    report: Reporter | None = None,
) -> Prepared:
    """Tokenize a run's data into `save_folder`.

    A finished store that fits is left as it is; an unfinished one is gone on with; one of other settings is refused.

    Args:
        run: the config; `dataset.data_path` or `dataset.sources` is read.
        save_folder: where the store goes; made if missing.
        num_proc: processes; None: as the config says.
        shard: the share of the parts that this process writes; the last shard to end finishes the store.
        skip: a JSONL file whose ids are left out (a left_out.jsonl, a quarantine.jsonl, what `doctor` wrote).
        report: called with the Progress now and then.

    Raises:
        InputError: the input is wrong, or more than `dataset.max_bad_share` of the records are.
    """
    plan = make_plan(run)
    return prepare_plan(
        plan, Path(save_folder), num_proc=num_proc, shard=shard, skip=Path(skip) if skip else None, report=report
    )


def prepare_plan(
    plan: Plan,
    folder: Path,
    *,
    num_proc: int | None = None,
    shard: Shard | None = None,
    skip: Path | None = None,
    report: Reporter | None = None,
) -> Prepared:
    """`prepare` for a plan that is made already."""
    if (folder / MANIFEST).is_file():
        return _already(folder, plan)
    if not plan.sets:
        raise InputError(
            "dataset.data_path is not set: there is nothing to prepare from. Set it to a LLaVA JSON or JSONL file, or another kind"
        )
    work = _Preparation(folder, plan, skip)
    work.begin()
    facts = work.write(num_proc or plan.num_proc, shard or Shard(), report or (lambda _: None))
    if (folder / MANIFEST).is_file():  # another shard finished the store meanwhile
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        return _already(folder, plan)
    if None in facts:
        return Prepared.unfinished(folder, [f for f in facts if f is not None], facts.count(None))
    try:
        return _prepared(folder, work.finish([f for f in facts if f is not None]))
    except FileNotFoundError:
        if (folder / MANIFEST).is_file():  # another shard ended at the same moment, and finished the store first
            return _already(folder, plan)
        raise


def finalize(run: Run, save_folder: str | Path, *, skip: str | Path | None = None) -> Prepared:
    """Finish a store whose parts were all written by shards.

    Raises:
        InputError: parts are missing; says how many, and which shard of how many would write the first.
    """
    plan, folder = make_plan(run), Path(save_folder)
    if (folder / MANIFEST).is_file():
        return _already(folder, plan)
    if not (folder / PARTS).is_dir():
        raise InputError(f"{folder}: holds no unfinished store. Run `prepare` without --finalize")
    work = _Preparation(folder, plan, Path(skip) if skip else None)
    work.begin()
    tasks = [replace(task, span=task.span.without_text()) for task in work.tasks()]
    facts = [part_facts(folder, task) for task in tasks]
    missing = [task.index for task, known in zip(tasks, facts, strict=True) if known is None]
    if missing:
        raise InputError(
            f"{folder}: {len(missing):,} of {len(tasks):,} parts are missing, the first is number {missing[0] + 1}. Run the shards "
            "that did not end again (the same command), or `prepare` without --shard, which writes what is missing"
        )
    return _prepared(folder, work.finish([f for f in facts if f is not None]))


def _already(folder: Path, plan: Plan) -> Prepared:
    manifest = read_manifest(folder)
    check_plan(folder, manifest, plan)
    return _prepared(folder, manifest, was_there=True)


class _Preparation:
    """Preparing one store: its folder is claimed, its parts written, its manifest made."""

    def __init__(self, folder: Path, plan: Plan, skip: Path | None) -> None:
        self.folder, self.plan = folder, plan
        self.sources = plan.open()
        self.skip = read_skip(skip) if skip else frozenset()
        sets = {
            (index, source.format): DataSet(plan.sets[index].layout, source.format, plan.sets[index].config.convert)
            for index, source in self.sources
        }
        order = list(sets)
        files = tuple((s.path, order.index((index, s.format))) for index, s in self.sources)
        self.job = Job(folder, tuple(sets.values()), files, self.skip)

    def begin(self) -> None:
        """Claim the folder, or go on in it.

        Raises:
            InputError: it holds something else.
        """
        sources = [[*source.identity(), source.format] for _, source in self.sources]
        skip = hashlib.sha256("\n".join(sorted(self.skip)).encode()).hexdigest() if self.skip else None
        converts = [planned.convert_hash for planned in self.plan.sets]
        identity = {"spec": asdict(self.plan.spec), "sources": sources, "skip": skip, "converts": converts}
        marker = self.folder / PARTS / "plan.json"
        # Looked at before the marker: another shard writes its first file after the marker.
        holds_more = self.folder.is_dir() and any(p.name != PARTS for p in self.folder.iterdir())
        if not marker.is_file():
            if holds_more:
                raise InputError(
                    f"{self.folder} is not empty and holds no store; nothing was changed. Choose a new folder"
                )
            write_whole(marker, json.dumps(identity))
            return
        found = json.loads(marker.read_bytes())
        if found == identity:
            return
        check_spec(self.folder, found, self.plan.spec)
        what = ", ".join(f"{name} ({size:,} bytes)" for name, size, *_ in found["sources"][:3])
        raise InputError(
            f"{self.folder} holds an unfinished store of {what}, which is not {self.plan.sets[0].config.data_path} as it is now, "
            "or of another --skip or dataset.convert. Remove the folder, or choose another"
        )

    def tasks(self) -> Iterator[Task]:
        """Every part of the store, in order."""
        index = 0
        for file, (_, source) in enumerate(self.sources):
            for span in self._spans(file, source):
                yield Task(index, file, span)
                index += 1

    def _index_path(self, file: int) -> Path:
        return self.folder / PARTS / f"source-{file:05d}.json"

    def _spans(self, file: int, source: Source) -> Iterator[Span]:
        """A source's spans; kept beside the parts once they are all known, so that the file is looked through only once."""
        index = self._index_path(file)
        needs_text = isinstance(source, TextSource) and source.compressed
        if index.is_file() and not needs_text:
            yield from (Span(*span) for span in json.loads(index.read_bytes())["spans"])
            return
        seen = []
        for span in source.spans():
            seen.append([span.start, span.end, span.cost])
            yield span
        if not index.is_file():
            write_whole(index, json.dumps({"spans": seen, "digest": source.digest()}))

    def write(self, num_proc: int, shard: Shard, report: Reporter) -> list[dict[str, Any] | None]:
        """Write this shard's parts that aren't there yet. Returns the facts of all parts, None for a part that is missing."""
        facts: dict[int, dict[str, Any] | None] = {}
        progress = Progress(sum(source.bytes for _, source in self.sources))

        def done(task: Task, result: dict[str, Any] | None) -> None:
            facts[task.index] = result
            progress.bytes += task.span.cost
            if result is not None:
                progress.samples += result["samples"]
                progress.left_out += len(result["left_out"])
            report(progress)

        elsewhere: list[Task] = []

        def missing() -> Iterator[Task]:
            for task in self.tasks():
                if (known := part_facts(self.folder, task)) is not None:
                    done(task, known)
                elif shard.has(task.index):
                    yield task
                else:
                    elsewhere.append(replace(task, span=task.span.without_text()))

        small = sum(source.bytes for _, source in self.sources) < pool.SMALL_BYTES
        if num_proc == 1 or small:
            worker = Worker(self.job)
            for task in missing():
                done(task, worker.write(task))
        else:
            pool.run_parallel(self.job, missing(), num_proc, work, done)
        for task in elsewhere:  # what the other shards have written meanwhile
            done(task, part_facts(self.folder, task))
        return [facts[i] for i in sorted(facts)]

    def finish(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the list of what was left out and the manifest; remove what only an unfinished store needs.

        Raises:
            InputError: too many records are bad, or none is good.
        """
        digests = [json.loads(self._index_path(i).read_bytes())["digest"] for i in range(len(self.sources))]
        left_out = self._left_out(parts)
        fixes: dict[str, int] = {}
        for part in parts:
            for fix, n in part["fixes"].items():
                fixes[fix] = fixes.get(fix, 0) + n
        write_whole(self.folder / LEFT_OUT, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in left_out))
        self._refuse_if_bad(sum(p["samples"] for p in parts), left_out)
        manifest = {
            "format_version": FORMAT_VERSION,
            "spec": asdict(self.plan.spec),
            "tokenizer": self.plan.tokenizer,
            "data_sets": [self._set_facts(k, parts) for k in range(len(self.plan.sets))],
            "sources": [
                {"name": s.path.name, "bytes": s.bytes, "mtime_ns": s.mtime_ns, "xxh3": digest, "data_set": index}
                for (index, s), digest in zip(self.sources, digests, strict=True)
            ],
            **_sums(parts),
            "left_out": len(left_out),
            "fixes": fixes,
            "encoder": sorted({p["encoder"] for p in parts}),
            "parts": [{k: p[k] for k in ("file", "samples", "bytes", "xxh3")} for p in parts],
        }
        write_manifest(self.folder, manifest, [p["file"] for p in parts])
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        for beside in self.folder.glob(".*.tmp"):  # what a killed run left half-written
            beside.unlink(missing_ok=True)
        return manifest

    def _set_facts(self, index: int, parts: list[dict[str, Any]]) -> dict[str, Any]:
        planned = self.plan.sets[index]
        own = [p for p in parts if self.sources[p["source"]][0] == index]
        formats = sorted({source.format for k, source in self.sources if k == index})
        return {
            "name": planned.name,
            "template": planned.layout.template.name,
            "format": "convert" if planned.config.convert else "+".join(formats),
            "convert": planned.convert_hash,
            **_sums(own),
        }

    def _left_out(self, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What was left out of all parts, its lines and rows numbered from 1 within its file."""
        several = len(self.sources) > 1
        first: dict[int, int] = {}
        found = []
        for part in parts:
            source = self.sources[part["source"]][1]
            start = first.get(part["source"], 1)
            for entry in part["left_out"]:
                where = {"source": source.path.name} if several else {}
                found.append({**entry, **where, source.unit: start + entry[source.unit]})
            first[part["source"]] = start + part["units"]
        return found

    def _refuse_if_bad(self, samples: int, left_out: list[dict[str, Any]]) -> None:
        bad = [e for e in left_out if e["reason"] != SKIPPED]
        total = samples + len(bad)
        where = ", ".join(planned.config.data_path for planned in self.plan.sets)
        if not total:
            raise InputError(f"{where}: holds no record")
        share = len(bad) / total
        if samples and share <= self.plan.max_bad_share:
            return
        examples = "; ".join(f"{_where(e)}: {e['reason']}" for e in bad[:3])
        raise InputError(
            f"{where}: {len(bad):,} of {total:,} records ({share:.1%}) are bad, more than dataset.max_bad_share "
            f"({self.plan.max_bad_share:.1%}). {examples}. All are listed in {self.folder / LEFT_OUT}. Mend them, leave them out "
            "with --skip, or raise max_bad_share"
        )


def read_skip(path: Path) -> frozenset[str]:
    """The ids that a list of bad records names: JSON lines with an "id".

    Raises:
        InputError: no such file, or a line is not such an object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--skip {path}: can't be read: {error}") from error
    ids = set()
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                ids.add(str(json.loads(line)["id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'--skip {path}, line {number}: expected a JSON object with an "id"') from error
    return frozenset(ids)


def _sums(parts: list[dict[str, Any]]) -> dict[str, int]:
    names = ("samples", "images", "tokens", "supervised", "truncated", "truncated_tokens")
    return {name: sum(p[name] for p in parts) for name in names}


def _where(entry: dict[str, Any]) -> str:
    place = next((f"{unit} {entry[unit]}" for unit in ("line", "row", "sample") if unit in entry), "")
    return ", ".join(x for x in (f"id {entry['id']}" if entry["id"] else "", entry.get("source", ""), place) if x)


def _prepared(folder: Path, manifest: dict[str, Any], was_there: bool = False) -> Prepared:
    names = ("samples", "tokens", "supervised", "left_out", "truncated", "fixes", "data_sets")
    encoder = "+".join(manifest["encoder"])
    return Prepared(folder=folder, encoder=encoder, was_there=was_there, **{n: manifest[n] for n in names})
