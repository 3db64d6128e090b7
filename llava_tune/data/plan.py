"""What a run's data settings mean: which files are read, and how their records become tokens."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_tune.config import DataSource, Run
from llava_tune.data.formats import convert_fingerprint, detect_format, load_function
from llava_tune.data.sources import Source, open_sources
from llava_tune.data.splits import split_name
from llava_tune.data.store import StoreSpec, check_source, check_spec
from llava_tune.data.tokens.layout import LayoutSpec
from llava_tune.data.tokens.templates import get_template
from llava_tune.data.tokens.tokenizer import load_vocabulary
from llava_tune.errors import InputError


@dataclass(frozen=True)
class PlannedSet:
    """One data set of a plan: what the config says of it, how its records become tokens, what its converter is."""

    config: DataSource
    layout: LayoutSpec
    convert_hash: str | None

    @property
    def name(self) -> str:
        return self.config.name or Path(self.config.data_path).stem


@dataclass(frozen=True)
class Plan:
    """A run's data settings, resolved: what to read and how to lay it out."""

    sets: tuple[PlannedSet, ...]
    spec: StoreSpec
    tokenizer: str
    max_bad_share: float
    num_proc: int

    def open(self) -> list[tuple[int, Source]]:
        """(index of its data set, source) of every file, in the store's order.

        Raises:
            InputError: a data path is missing or broken, or its format can't be told.
        """
        found = []
        for index, planned in enumerate(self.sets):
            config = planned.config
            for source in open_sources(config.data_path, split_name(config.split)):
                if not config.convert:
                    source.format = detect_format(source) if config.format == "auto" else config.format
                found.append((index, source))
        return found


def make_layout(run: Run, template: str | None = None) -> tuple[LayoutSpec, str]:
    """Resolve tokenizer, template and the tokens of an image; with the tokenizer's fingerprint.

    Raises:
        InputError: any of them doesn't exist or doesn't fit.
    """
    from llava_tune.model.tokens import image_tokens

    data = run.dataset
    chosen = get_template(template or data.template)
    if data.system is not None:
        chosen = replace(chosen, default_system=data.system)
    vocabulary = load_vocabulary(run.model.llm.tokenizer or run.model.llm.name)
    patches = image_tokens(run.model.vision)
    layout = LayoutSpec.of(vocabulary, chosen, data.max_length, patches, data.image_position)
    return layout, vocabulary.fingerprint


def make_plan(run: Run) -> Plan:
    """Resolve what `prepare` needs.

    Raises:
        InputError: an image folder is missing, a converter can't be loaded, or see `make_layout`.
    """
    data = run.dataset
    layouts: dict[str, LayoutSpec] = {}
    sets = []
    for source in data.all_sources():
        template = source.template or data.template
        if template not in layouts:
            layouts[template], fingerprint = make_layout(run, template)
        folder = source.image_folder
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"dataset.image_folder {folder}: no such folder. Records name their images relative to it")
        if source.convert:
            load_function(source.convert)
        sets.append(
            PlannedSet(source, layouts[template], convert_fingerprint(source.convert) if source.convert else None)
        )
    if not sets:
        layouts[data.template], fingerprint = make_layout(run)
    used = list(layouts.values())
    spec = StoreSpec(
        tokenizer=fingerprint,
        template="+".join(x.template.name for x in used),
        template_hash=hashlib.sha256(repr([x.template for x in used]).encode()).hexdigest(),
        max_length=data.max_length,
        image_tokens=used[0].image_tokens,
        image_position=data.image_position,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Plan(
        tuple(sets), spec, run.model.llm.tokenizer or run.model.llm.name, data.max_bad_share, data.num_proc or cores
    )


def check_plan(folder: Path, manifest: dict[str, Any], plan: Plan) -> None:
    """Whether a finished store is what a plan would give.

    Raises:
        InputError: its settings differ, or a source file changed since; names what.
    """
    check_spec(folder, manifest, plan.spec)
    known = manifest["data_sets"]
    if plan.sets and [d["name"] for d in known] != [s.name for s in plan.sets]:
        raise InputError(
            f"the store {folder} was made from {', '.join(d['name'] for d in known)}; the config has "
            f"{', '.join(s.name for s in plan.sets)}. Prepare again into another folder, or leave the data paths out of the config"
        )
    for data, planned in zip(known, plan.sets, strict=bool(plan.sets)):
        if data["convert"] != planned.convert_hash:
            raise InputError(
                f"the store {folder}: dataset.convert of {planned.name} has changed since. Prepare again into another folder"
            )
        for source in _existing(planned.config):
            check_source(folder, manifest, source)


def _existing(config: DataSource) -> list[Source]:
    """The source files, or none: a store is used without what it was made from, too."""
    try:
        return open_sources(config.data_path, split_name(config.split))
    except InputError:
        return []
