"""Samples as a person wants to see them: their text, what of it is supervised, their images, and where they are cut."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llava_tune.config import Run
from llava_tune.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_tune.data.formats import converter
from llava_tune.data.images import BadImage, opened
from llava_tune.data.mix import image_folders
from llava_tune.data.parts import DataSet, Job, Part, Task, Worker
from llava_tune.data.plan import Plan, make_plan
from llava_tune.data.store import StoreRows, images_of, read_manifest
from llava_tune.data.tokens.tokenizer import load_tokenizer
from llava_tune.errors import InputError

_FIRST_RECORDS = 10_000


@dataclass(frozen=True)
class Piece:
    """A run of a sample: text, or an image.

    Attributes:
        text: decoded; empty for an image.
        supervised: the model is trained to say it.
        image: number of the image, from 0; None for text.
        control: the text is a control token.
    """

    text: str
    supervised: bool
    image: int | None = None
    control: bool = False


@dataclass(frozen=True)
class Picture:
    """An image of a sample: its reference, and its size or what is wrong with it."""

    reference: str
    size: tuple[int, int] | None
    problem: str | None = None


@dataclass(frozen=True)
class Sample:
    """One sample, decoded."""

    row: int
    id: str
    data_set: str
    pieces: list[Piece]
    pictures: list[Picture]
    tokens: int
    supervised: int
    cut: bool


@dataclass
class Samples:
    """Some samples of a run or a store, and figures of the whole.

    Attributes:
        title: what was looked at.
        chosen: the samples.
        total: samples there are.
        lengths: int32 of all samples, for each data set by name.
        sums: for each data set: samples, images, tokens, supervised.
        folders: where the images of each data set are.
    """

    title: str
    chosen: list[Sample]
    total: int
    lengths: dict[str, np.ndarray]
    sums: dict[str, dict[str, int]]
    image_tokens: int
    max_length: int
    folders: dict[str, Path | None] = field(default_factory=dict)
    partial: bool = False
    """The figures are of the first records of each data set only."""


def samples_of_store(
    folder: Path, count: int, *, tokenizer: str | None, image_folder: Path | None, run: Run | None = None, seed: int = 0
) -> Samples:
    """Random samples of a prepared store.

    Args:
        tokenizer: name or folder; None: the one that the store was made with.
        image_folder: where its images are; None: they are not shown.
        run: the config that the store belongs to, if it is known.

    Raises:
        InputError: not a store; or its tokenizer is not where it was.
    """
    manifest = read_manifest(folder)
    rows = StoreRows(folder)
    all_lengths = rows.lengths()
    starts = np.cumsum([0, *(d["samples"] for d in manifest["data_sets"])])
    names = [d["name"] for d in manifest["data_sets"]]
    folders = image_folders(run.dataset, manifest) if run is not None else [image_folder] * len(names)
    decode = _Decoder(tokenizer or manifest["tokenizer"])
    spec = manifest["spec"]
    picked = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    chosen = []
    for index in picked:
        row = rows[index]
        k = int(np.searchsorted(starts, index, side="right")) - 1
        ids, labels = row["input_ids"], row["labels"]
        pieces = decode.pieces(ids, labels)
        chosen.append(
            Sample(
                row=index,
                id=row["id"],
                data_set=names[k],
                pieces=pieces,
                pictures=[_look(folders[k], image) for image in images_of(row["image"])],
                tokens=int(row["length"]),
                supervised=int((labels >= 0).sum()),
                cut=int(row["length"]) > spec["max_length"] - spec["image_tokens"] and not _ends(pieces),
            )
        )
    return Samples(
        title=str(folder),
        chosen=chosen,
        total=len(rows),
        lengths={n: all_lengths[a:b] for n, a, b in zip(names, starts[:-1], starts[1:], strict=True)},
        sums={
            d["name"]: {k: d[k] for k in ("samples", "images", "tokens", "supervised")} for d in manifest["data_sets"]
        },
        image_tokens=spec["image_tokens"],
        max_length=spec["max_length"],
        folders=dict(zip(names, folders, strict=True)),
    )


def samples_of_run(run: Run, count: int, seed: int = 0) -> Samples:
    """Random samples of the first records of each of a config's data sets, tokenized now.

    Raises:
        InputError: the config or its data is wrong.
    """
    given = run.dataset.offline_processed_text_folder
    name = run.model.llm.tokenizer or run.model.llm.name
    if given is not None:
        return samples_of_store(Path(given), count, tokenizer=name, image_folder=None, run=run, seed=seed)
    plan = make_plan(run)
    decode = _Decoder(name)
    found = Samples("", [], 0, {}, {}, plan.spec.image_tokens, plan.spec.max_length)
    found.title = plan.sets[0].config.data_path if len(plan.sets) == 1 else ", ".join(p.name for p in plan.sets)
    folders = image_folders(run.dataset, {"data_sets": [{"name": p.name} for p in plan.sets]})
    for k, batch, partial in _first_batches(plan):
        found.partial |= partial
        name = plan.sets[k].name
        found.lengths[name] = batch.lengths
        found.sums[name] = {
            "samples": len(batch.ids),
            "images": sum(map(len, batch.images)),
            "tokens": int(batch.lengths.sum()),
            "supervised": int((batch.labels >= 0).sum()),
        }
        cut = {i for i, _, _ in batch.cut}
        share = max(1, count // len(plan.sets))
        for i in sorted(random.Random(seed).sample(range(len(batch.ids)), min(share, len(batch.ids)))):
            span = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
            labels = batch.labels[span]
            found.chosen.append(
                Sample(
                    row=found.total + i,
                    id=batch.ids[i],
                    data_set=name,
                    pieces=decode.pieces(batch.input_ids[span], labels),
                    pictures=[_look(folders[k], image) for image in batch.images[i]],
                    tokens=int(batch.lengths[i]),
                    supervised=int((labels >= 0).sum()),
                    cut=int(batch.rows[i]) in cut,
                )
            )
        found.total += len(batch.ids)
        found.folders[name] = folders[k]
    if not found.chosen:
        raise InputError(f"{found.title}: no record of it can be used; `llava-tune doctor` says why")
    return found


def _first_batches(plan: Plan) -> Iterator[tuple[int, Any, bool]]:
    """(index of the data set, its first records tokenized, whether there are more)."""
    for index, group in groupby(plan.open(), key=lambda pair: pair[0]):
        source, *others = (source for _, source in group)
        planned = plan.sets[index]
        data = DataSet(planned.layout, source.format, planned.config.convert)
        worker = Worker(Job(Path(), (data,), ((source.path, 0),)))
        spans = source.spans()
        span = next(spans)
        part = Part(Task(0, 0, replace(span, cost=0)), source, worker.layout(planned.layout), frozenset())
        records = part.records(source.read(span), converter(data.format, data.convert))
        more = bool(others) or len(records) > _FIRST_RECORDS or next(spans, None) is not None
        yield index, part.tokenize(records[:_FIRST_RECORDS], 0), more


class _Decoder:
    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        self._special = set(self.tokenizer.all_special_ids)

    def pieces(self, ids: np.ndarray, labels: np.ndarray) -> list[Piece]:
        found: list[Piece] = []
        images = 0
        kinds = [
            (bool(label != IGNORE_INDEX), token == IMAGE_TOKEN_INDEX, token in self._special)
            for token, label in zip(ids.tolist(), labels.tolist(), strict=True)
        ]
        at = 0
        for (supervised, is_image, control), run in groupby(kinds):
            n = len(list(run))
            if is_image:
                found += [Piece("", False, images + k) for k in range(n)]
                images += n
            else:
                text = self.tokenizer.decode(ids[at : at + n].tolist(), clean_up_tokenization_spaces=False)
                found.append(Piece(str(text), supervised, None, control))
            at += n
        return found


def _ends(pieces: Sequence[Piece]) -> bool:
    """Whether the last answer's end token is there."""
    return any(p.control and p.supervised for p in pieces[-2:])


def _look(folder: Path | None, reference: str) -> Picture:
    if folder is None:
        return Picture(reference, None, "dataset.image_folder is not set")
    try:
        with opened(folder, reference) as image:
            return Picture(reference, image.size)
    except BadImage as error:
        return Picture(reference, None, str(error))
