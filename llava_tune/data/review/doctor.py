"""Reads all that a run will read, and says what would harm it, before it starts."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llava_tune.config import Run
from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.data.formats import converter, detect_format
from llava_tune.data.images import MAX_PIXELS, BadImage, opened
from llava_tune.data.mix import image_folders
from llava_tune.data.parts import BATCH_RECORDS, DataSet, Job, Part, Task, Worker, this_worker
from llava_tune.data.plain import RawRecord
from llava_tune.data.plan import Plan, make_plan
from llava_tune.data.pool import SMALL_BYTES, run_parallel
from llava_tune.data.records import BadRecord, Record, parse_record
from llava_tune.data.review.findings import EXAMPLES, KINDS, ORDER, Finding
from llava_tune.data.sources import Source, open_sources
from llava_tune.data.sources.text import TextSource
from llava_tune.data.splits import split_name
from llava_tune.errors import InputError
from llava_tune.paths import cache_folder

_NARROW = 8
_SUFFIXES = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
}


@dataclass
class Counts:
    """What there is of a part, or of all data.

    Attributes:
        records, images, tokens, supervised: images are counted as often as records name them.
        supervised_lost: supervised tokens cut off by max_length.
        sizes: distinct images by their longer side, in steps of 256 pixels.
    """

    records: int = 0
    images: int = 0
    tokens: int = 0
    supervised: int = 0
    supervised_lost: int = 0
    sizes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        for part in fields(Counts):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))


@dataclass
class Checked(Counts):
    """What one part holds: counts, findings with their place in the part, and hashes to find copies by."""

    units: int = 0
    findings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    id_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    text_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))


@dataclass
class Report(Counts):
    """What `doctor` found.

    Attributes:
        lost: records that would take no part.
        findings: worst first.
        bad: every record or image that would be left out, as `prepare --skip` reads it.
    """

    lost: int = 0
    findings: list[Finding] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)

    @property
    def harmful(self) -> bool:
        return any(f.severity == "error" for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The report as plain data, without the full list of bad records."""
        found = {
            name: getattr(self, name)
            for name in ("records", "images", "tokens", "supervised", "supervised_lost", "lost", "sizes")
        }
        kinds = [{**asdict(f), "what": KINDS[f.kind].what, "advice": KINDS[f.kind].advice} for f in self.findings]
        return {**found, "harmful": self.harmful, "findings": kinds}


Progress = Callable[[int, int, int], None]
"""Called with bytes read, bytes in all, and findings so far."""


def examine_run(
    run: Run,
    *,
    quick: bool = False,
    model: bool = True,
    num_proc: int | None = None,
    report: Progress | None = None,
) -> Report:
    """Check a run's records, images and disk space.

    Args:
        quick: read only the images' headers.
        model: also build the model without its weights, to see that it can be built and how large its checkpoints are.
        num_proc: processes; None: as the config says.
        report: called now and then.

    Raises:
        InputError: the config itself is wrong (no such tokenizer, template, folder).
    """
    plan = make_plan(run)
    if not plan.sets:
        raise InputError("dataset.data_path is not set: there is nothing to examine")
    doctor = _Doctor(run, plan, quick)
    doctor.examine(num_proc or plan.num_proc, report or (lambda *_: None))
    if model:
        doctor.examine_model()
    return doctor.finish()


@dataclass(frozen=True)
class _ImageJob(Job):
    """A job that also knows where the images of each file are, and how closely to look."""

    folders: tuple[Path | None, ...] = ()
    quick: bool = False


class _Doctor:
    def __init__(self, run: Run, plan: Plan, quick: bool) -> None:
        self.run, self.plan = run, plan
        self.found: dict[str, Finding] = {}
        self.checkpoint_bytes = 0
        self.result = Report()
        self.sources: list[tuple[int, Source]] = []
        for index, planned in enumerate(plan.sets):
            for source in self._open(planned.config.data_path, split_name(planned.config.split)):
                try:
                    if not planned.config.convert:
                        given = planned.config.format
                        source.format = detect_format(source) if given == "auto" else given
                    self.sources.append((index, source))
                except InputError as error:
                    self._add("source", {"source": str(source.path), "reason": str(error)})
        manifest = {"data_sets": [{"name": s.name} for s in plan.sets]}
        folders = image_folders(run.dataset, manifest)
        sets = tuple(DataSet(plan.sets[i].layout, s.format, plan.sets[i].config.convert) for i, s in self.sources)
        files = tuple((s.path, k) for k, (_, s) in enumerate(self.sources))
        self.job = _ImageJob(Path(), sets, files, folders=tuple(folders[i] for i, _ in self.sources), quick=quick)
        self.parts: dict[int, tuple[Task, Checked]] = {}

    def _open(self, data_path: str, split: str | None) -> list[Source]:
        try:
            return open_sources(data_path, split)
        except InputError as error:
            self._add("source", {"source": data_path, "reason": str(error)})
            return []

    def _add(self, kind: str, example: dict[str, Any]) -> None:
        if kind not in self.found:
            self.found[kind] = Finding(kind, severity=KINDS[kind].severity)
        self.found[kind].add(example)

    def examine(self, num_proc: int, report: Progress) -> None:
        total = sum(source.bytes for _, source in self.sources)
        read = 0

        def done(task: Task, checked: Checked) -> None:
            nonlocal read
            self.parts[task.index] = replace(task, span=task.span.without_text()), checked
            read += task.span.cost
            report(read, total, sum(len(c.findings) for _, c in self.parts.values()))

        if num_proc == 1 or total < SMALL_BYTES:
            worker = Worker(self.job)
            for task in self._tasks():
                done(task, examine_part(worker, task))
        else:
            run_parallel(self.job, self._tasks(), num_proc, examine_task, done)

    def examine_model(self) -> None:
        """Whether the model can be built, and its checkpoints' size. Imports torch, so that it comes after the workers."""
        from llava_tune.model.size import checkpoint_bytes

        try:
            self.checkpoint_bytes = checkpoint_bytes(self.run.model)
        except InputError as error:
            self._add("model", {"source": "model", "reason": str(error)})

    def _tasks(self) -> Iterator[Task]:
        index = 0
        for file, (_, source) in enumerate(self.sources):
            try:
                for span in source.spans():
                    yield Task(index, file, span)
                    index += 1
            except InputError as error:
                self._add("source", {"source": str(source.path), "reason": str(error)})

    def finish(self) -> Report:
        result = self.result
        first: dict[int, int] = {}
        lost: set[tuple[int, str, Any]] = set()
        for _, (task, checked) in sorted(self.parts.items()):
            source = self.sources[task.file][1]
            start = first.get(task.file, 1)
            for kind, example in checked.findings:
                placed = {**example, source.unit: start + example["at"], "source": source.path.name}
                del placed["at"]
                self._add(kind, placed)
                if KINDS[kind].lost:
                    lost.add((task.file, placed["id"], placed[source.unit]))
                    result.bad.append(placed)
            first[task.file] = start + checked.units
            result.add(checked)
        result.lost = len(lost)
        self._find_copies()
        self._check_disk()
        if not result.records and self.sources:
            self._add("source", {"source": self.plan.sets[0].config.data_path, "reason": "holds no record"})
        share = result.lost / max(result.records, 1)
        if share > self.plan.max_bad_share:
            for finding in self.found.values():
                if KINDS[finding.kind].lost:
                    finding.severity = "error"
        result.findings = sorted(self.found.values(), key=lambda f: (ORDER[f.severity], -f.count))
        return result

    def _find_copies(self) -> None:
        """Records with one text, and ids with several texts."""
        parts = [self.parts[k] for k in sorted(self.parts)]
        if not parts:
            return
        texts = np.concatenate([c.text_hashes for _, c in parts])
        ids = np.concatenate([c.id_hashes for _, c in parts])
        starts = np.cumsum([0, *(len(c.text_hashes) for _, c in parts)])
        order = np.argsort(texts, kind="stable")
        again = np.zeros(len(texts), bool)
        again[order[1:]] = texts[order[1:]] == texts[order[:-1]]
        has_id = ids != 0
        distinct = np.flatnonzero(has_id & ~again)
        by_id = distinct[np.argsort(ids[distinct], kind="stable")]
        same_id = by_id[1:][ids[by_id[1:]] == ids[by_id[:-1]]]
        for kind, rows in (("duplicate", np.flatnonzero(again)), ("duplicate_id", np.sort(same_id))):
            for row in rows.tolist():
                finding = self.found.get(kind)
                if finding is not None and len(finding.examples) >= EXAMPLES:
                    finding.count += 1  # only what is shown is looked up
                    continue
                k = int(np.searchsorted(starts, row, side="right")) - 1
                self._add(kind, self._describe(parts[k][0], int(row - starts[k])))

    def _describe(self, task: Task, index: int) -> dict[str, Any]:
        """A record's id and place, read again."""
        source = self.sources[task.file][1]
        start = 1 + sum(c.units for t, c in self.parts.values() if t.file == task.file and t.index < task.index)
        span = task.span
        if isinstance(source, TextSource) and source.compressed:  # reading it again would mean from its start
            return {"source": source.path.name, "record": index + 1}
        for k, (place, row) in enumerate(source.read(span).rows()):
            if k == index:
                identity = row.get("id") if isinstance(row, dict) else None
                return {"id": str(identity), source.unit: start + place, "source": source.path.name}
        return {}

    def _check_disk(self) -> None:
        """Room for the store in the cache (8 bytes a token, and the ids and paths), and for the checkpoints in the work dir."""
        result = self.result
        text_tokens = result.tokens - result.images * max(self.plan.spec.image_tokens - 1, 0)
        store = 0 if self.run.dataset.offline_processed_text_folder else 8 * text_tokens + 100 * result.records
        checkpoints = self.checkpoint_bytes * (self.run.training.save_total_limit + 1)
        needs = {
            "the cache": (cache_folder(), store),
            "the work dir": (Path(self.run.work_dir or "work_dirs"), checkpoints),
        }
        for name, (folder, needed) in needs.items():
            there = folder
            while not there.exists():
                there = there.parent
            free = shutil.disk_usage(there).free
            if free < needed:
                reason = f"{name} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed"
                self._add("disk", {"source": str(folder), "reason": reason})


def examine_task(task: Task) -> Checked:
    """Examine a part in a worker process."""
    return examine_part(this_worker(), task)


def examine_part(worker: Worker, task: Task) -> Checked:
    """Everything about one part: its records as `prepare` would take them, its images, its texts."""
    path, set_index = worker.job.files[task.file]
    data = worker.job.sets[set_index]
    source = worker.source(path)
    layout = worker.layout(data.layout)
    chunk = source.read(task.span)
    part = Part(task, source, layout, frozenset())
    records = part.records(chunk, converter(data.format, data.convert))
    checked = Checked(units=chunk.units, records=len(records))
    checked.text_hashes, checked.id_hashes = _hashes(records)
    notes: list[tuple[int, str, str]] = []
    for start in range(0, len(records), BATCH_RECORDS):
        some = records[start : start + BATCH_RECORDS]
        before = sum(part.fixes.values())
        batch = part.tokenize(some, start)
        for i, tokens, lost in batch.cut:
            checked.supervised_lost += lost
            notes.append((start + i, "truncated", f"{tokens:,} tokens, {lost:,} supervised ones lost"))
        if sum(part.fixes.values()) > before:
            notes += [(start + i, "roles", why) for i, why in _mended(some, part, start)]
        for i, record in enumerate(some):
            for kind, why in _in_text(record, layout.spec.template.control):
                notes.append((start + i, kind, why))
        _look_at_images(worker.job, task.file, batch, start, checked, notes)
    checked.images, checked.tokens = part.counts["images"], part.counts["tokens"]
    checked.supervised = part.counts["supervised"]
    names = {index: identity for index, identity, _ in part.left_out}
    notes += [
        (index, "unsupervised" if why.startswith("nothing supervised") else _bad_kind(why), why)
        for index, _, why in part.left_out
    ]
    if notes:
        positions = part.places(chunk)
        for index, kind, why in sorted(notes):
            identity = names.get(index) or part.id_of(records[index], index)
            reason, _, image = why.partition("\0")
            example = {"id": identity, "at": positions[index], "reason": reason}
            checked.findings.append((kind, {**example, **({"image": image} if image else {})}))
    return checked


def _bad_kind(why: str) -> str:
    return "image_outside" if "leaves the image folder" in why else "record"


def _hashes(records: Any) -> tuple[np.ndarray, np.ndarray]:
    """xxh3-64 of each record's text with its images, and of its id (0: none); a record that can't be read is like no other."""
    unique = iter(np.random.default_rng().integers(0, 2**63, len(records)).tolist())
    texts = np.zeros(len(records), np.uint64)
    ids = np.zeros(len(records), np.uint64)
    for i, record in enumerate(records):
        if isinstance(record, RawRecord):
            said = "\x1e".join(f"{m.role}\x1f{m.value}" for m in record.conversations)
            content = f"{record.image}\x1d{record.system}\x1d{said}"
            identity = record.id
        elif isinstance(record, Record):
            content, identity = repr(record[1:4]), record.id
        else:
            texts[i] = next(unique)
            continue
        texts[i] = xxhash.xxh3_64_intdigest(content.encode("utf-8", "surrogatepass"))
        if identity is not None:
            ids[i] = xxhash.xxh3_64_intdigest(str(identity).encode("utf-8", "surrogatepass")) or 1
    return texts, ids


def _mended(records: Any, part: Part, start: int) -> Iterator[tuple[int, str]]:
    for i, record in enumerate(records):
        try:
            done = parse_record(record.as_dict(), part.name(start + i)) if isinstance(record, RawRecord) else record
        except BadRecord:
            continue
        if done is not None and done.fixes:
            yield i, "; ".join(done.fixes)


def _in_text(record: RawRecord | Record | None, control: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(record, RawRecord):
        texts = [m.value for m in record.conversations]
        answers = [m.value for m in record.conversations if m.role in ("gpt", "assistant")]
    elif isinstance(record, Record):
        texts = [text for pair in record.rounds for text in pair]
        answers = [answer for _, answer in record.rounds]
    else:
        return
    leaked = [c for c in control if any(c in text for text in texts)]
    if leaked:
        yield "control_text", f"the text holds {', '.join(leaked)}"
    if any(IMAGE_PLACEHOLDER in answer for answer in answers):
        yield "placeholder_in_answer", "the answer holds <image>"


_seen: dict[tuple[Any, str], list[tuple[str, str]]] = {}
_SEEN_MOST = 1_000_000


def _look_at_images(
    job: Job, file: int, batch: Any, start: int, checked: Checked, notes: list[tuple[int, str, str]]
) -> None:
    assert isinstance(job, _ImageJob)
    folder = job.folders[file]
    for row, images in zip(batch.rows.tolist(), batch.images, strict=True):
        for image in images:
            key = (folder, image)
            if key not in _seen:
                if len(_seen) > _SEEN_MOST:
                    _seen.clear()
                _seen[key] = _findings_of_image(folder, image, job.quick, checked)
            notes += [(start + row, kind, f"{why}\0{image}") for kind, why in _seen[key]]


def _findings_of_image(folder: Path | None, image: str, quick: bool, checked: Checked) -> list[tuple[str, str]]:
    if folder is None:
        return [("image_missing", "dataset.image_folder is not set")]
    found: list[tuple[str, str]] = []
    try:
        with opened(folder, image) as picture:
            width, height = picture.size
            if not quick:
                picture.load()
            if max(width, height) > _NARROW * min(width, height):
                found.append(("image_narrow", f"{width} x {height} pixels"))
            if getattr(picture, "n_frames", 1) > 1:
                found.append(("image_animated", f"{picture.n_frames} frames"))  # type: ignore[attr-defined]
            if picture.mode not in ("RGB", "L"):
                found.append(("image_mode", f"mode {picture.mode}"))
            turned = picture.getexif().get(0x0112, 1)
            if turned not in (0, 1):
                found.append(("image_rotated", f"EXIF orientation {turned}"))
            suffix = image.rpartition(".")[2].lower()
            if suffix in _SUFFIXES and picture.format not in (_SUFFIXES[suffix], "MPO"):
                found.append(("image_suffix", f"a {picture.format} file"))
            size = max(width, height) // 256 * 256
            checked.sizes[f"{size}-{size + 255}"] += 1
    except BadImage as error:
        return [(_kind_of_bad_image(str(error)), str(error))]
    return found


def _kind_of_bad_image(why: str) -> str:
    if "no such file" in why:
        return "image_missing"
    if "folder" in why or "null byte" in why or "absolute" in why:
        return "image_outside"
    return "image_huge" if f"{MAX_PIXELS:,}" in why or "bomb" in why else "image_broken"
