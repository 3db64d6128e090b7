"""Records to token ids and labels, many at a time, as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llava_tune.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava_tune.data.encoder import Encoder
from llava_tune.data.records import Record
from llava_tune.data.templates import Template
from llava_tune.data.tokenizer import Vocabulary
from llava_tune.errors import InputError


@dataclass(frozen=True)
class LayoutSpec:
    """All that decides a record's ids and labels, free of any tokenizer object (it travels to worker processes)."""

    plain_json: str
    template: Template
    control_ids: dict[str, int]
    forbidden: tuple[int, ...]
    bos: int | None
    max_length: int
    image_tokens: int
    image_position: Literal["front", "as_written"]

    @staticmethod
    def of(
        vocabulary: Vocabulary,
        template: Template,
        max_length: int,
        image_tokens: int,
        image_position: Literal["front", "as_written"],
    ) -> LayoutSpec:
        """
        Raises:
            InputError: the tokenizer lacks a control token of the template, or not one image fits max_length.
        """
        control = {c: token for c in template.control if (token := vocabulary.id_of(c)) is not None}
        missing = [c for c in template.control if c not in control]
        if missing:
            raise InputError(
                f"dataset.template {template.name!r} needs the token(s) {', '.join(missing)}, which the tokenizer lacks. "
                "Choose the template that the language model was trained with"
            )
        if image_tokens >= max_length:
            raise InputError(
                f"dataset.max_length is {max_length}, but one image takes {image_tokens} tokens: no sample with an image "
                f"fits. Set max_length to more than {image_tokens}"
            )
        forbidden = tuple(sorted({*control.values(), *vocabulary.special_ids}))
        plain = vocabulary.plain_json()
        return LayoutSpec(plain, template, control, forbidden, vocabulary.bos, max_length, image_tokens, image_position)


@dataclass
class TokenizedBatch:
    """Samples behind one another.

    Attributes:
        input_ids: int32 [tokens], an image is one IMAGE_TOKEN_INDEX.
        labels: int32 [tokens], IGNORE_INDEX where unsupervised.
        offsets: int64 [samples + 1] into both.
        lengths: int32 [samples], tokens after each image has become its patches.
        ids, images: of each sample.
        unsupervised: (index into the records given, why) of the records that gave no sample.
        truncated: samples cut to max_length.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    ids: list[str]
    images: list[list[str]]
    unsupervised: list[tuple[int, str]] = field(default_factory=list)
    truncated: int = 0


class Layout:
    """Lays out records in a chat template. One sample is a run of pieces; a piece is a constant or an encoded text.

    All texts of a batch are encoded in one call; ids and labels then are one gather each, without a Python loop over
    tokens.
    """

    def __init__(self, spec: LayoutSpec) -> None:
        self.spec = spec
        self.encoder = Encoder(spec.plain_json, np.array(spec.forbidden, np.int32))
        self._constants: list[np.ndarray] = []
        self._supervised: list[bool] = []
        template = spec.template
        self._bos = self._constant([spec.bos] if spec.bos is not None else [])
        self._image = self._constant([IMAGE_TOKEN_INDEX])
        self._suffix = self._constant(self._ids(template.parts(template.suffix)), supervised=True)
        self._sep = self._constant(self._ids(template.parts(template.sep)))
        self._system = _Slot(self, template.system)
        self._instruction = _Slot(self, template.instruction)

    def _constant(self, ids: list[int], supervised: bool = False) -> int:
        self._constants.append(np.array(ids, np.int32))
        self._supervised.append(supervised)
        return len(self._constants) - 1

    def _ids(self, parts: list[str]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            control = self.spec.control_ids.get(part)
            ids.extend([control] if control is not None else self.encoder.encode([part])[0].tolist())
        return ids

    def tokenize(self, records: list[Record]) -> TokenizedBatch:
        """Tokenize records; see TokenizedBatch."""
        pieces: list[int] = []
        texts: list[str] = []
        supervised = bytearray()
        bounds = [0]
        base = len(self._constants)
        default_system = self.spec.template.default_system
        bos, suffix, sep = self._bos, self._suffix, self._sep
        for record in records:
            pieces.append(bos)
            if system := record.system or default_system:
                self._system.add([system], pieces, texts, supervised, base)
            for question, answer in record.rounds:
                self._instruction.add(self._chunks(question), pieces, texts, supervised, base)
                pieces += (base + len(texts), suffix, sep)
                texts.append(answer)
                supervised.append(1)
            bounds.append(len(pieces))
        return self._assemble(records, np.array(pieces, np.int64), np.array(bounds), texts, supervised)

    def prompt(self, rounds: list[tuple[str, str]], question: str, system: str = "") -> list[int]:
        """The ids up to where the model's answer begins: earlier rounds with their answers, then the question."""
        record = Record("", [], system, [*rounds, (question, "")])
        batch = self.tokenize([record])
        tail = len(self._constants[self._suffix]) + len(self._constants[self._sep])
        return batch.input_ids[: len(batch.input_ids) - tail].tolist()

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        return self._constants[self._suffix].tolist()[:1]

    def _chunks(self, text: str) -> list[str]:
        """The text between its image placeholders; a turn's single image goes to the front if the config says so."""
        chunks = text.split(IMAGE_PLACEHOLDER)
        if len(chunks) == 2 and self.spec.image_position == "front":
            rest = (chunks[0] + chunks[1]).strip()
            return ["", "\n" + rest if rest else ""]
        return chunks

    def _assemble(
        self, records: list[Record], pieces: np.ndarray, bounds: np.ndarray, texts: list[str], supervised: bytearray
    ) -> TokenizedBatch:
        flat, offsets = self.encoder.encode(texts)
        constants = self._constants
        constant_lengths = np.array([len(c) for c in constants], np.int64)
        pool = np.concatenate([*constants, flat])
        pool_lengths = np.concatenate([constant_lengths, np.diff(offsets)])
        pool_starts = np.cumsum(pool_lengths) - pool_lengths
        is_supervised = np.concatenate([np.array(self._supervised), np.frombuffer(supervised, np.uint8).astype(bool)])

        lengths = pool_lengths[pieces]
        ends = np.cumsum(lengths)
        gather = np.arange(int(ends[-1]) if len(ends) else 0)
        gather += np.repeat(pool_starts[pieces] - (ends - lengths), lengths)
        input_ids = pool[gather]
        labels = np.where(np.repeat(is_supervised[pieces], lengths), input_ids, IGNORE_INDEX).astype(np.int32)
        sample_offsets = np.concatenate([[0], ends])[bounds]
        images_in = np.array([len(r.images) for r in records], np.int64)
        total = np.diff(sample_offsets) + images_in * (self.spec.image_tokens - 1)
        batch = TokenizedBatch(
            input_ids,
            labels,
            sample_offsets,
            total.astype(np.int32),
            [r.id for r in records],
            [r.images for r in records],
        )
        return self._truncate(batch) if (total > self.spec.max_length).any() else batch

    def _truncate(self, batch: TokenizedBatch) -> TokenizedBatch:
        """Cut samples to max_length (an image is whole or gone) and leave out those with nothing supervised left."""
        keep = np.ones(len(batch.input_ids), bool)
        whole = np.ones(len(batch.ids), bool)
        limit = self.spec.max_length
        images = list(batch.images)
        kept = np.diff(batch.offsets)
        for i in np.flatnonzero(batch.lengths > limit).tolist():
            a, b = int(batch.offsets[i]), int(batch.offsets[i + 1])
            row = batch.input_ids[a:b]
            sizes = np.cumsum(np.where(row == IMAGE_TOKEN_INDEX, self.spec.image_tokens, 1))
            n = int(np.searchsorted(sizes, limit, side="right"))
            batch.truncated += 1
            if (batch.labels[a : a + n] == IGNORE_INDEX).all():
                batch.unsupervised.append(
                    (i, f"nothing supervised within max_length {limit} (it has {sizes[-1]} tokens)")
                )
                whole[i], n = False, 0
            keep[a + n : b] = False
            kept[i] = n
            images[i] = images[i][: int((row[:n] == IMAGE_TOKEN_INDEX).sum())]
            batch.lengths[i] = sizes[n - 1] if n else 0
        rows = np.flatnonzero(whole).tolist()
        batch.input_ids, batch.labels = batch.input_ids[keep], batch.labels[keep]
        batch.offsets = np.concatenate([[0], np.cumsum(kept[whole])])
        batch.lengths = batch.lengths[whole]
        batch.ids, batch.images = [batch.ids[i] for i in rows], [images[i] for i in rows]
        return batch


class _Slot:
    """A layout with one {text}: the constant before, the constant after, and the text that touches the record's own."""

    def __init__(self, layout: Layout, template: str) -> None:
        before, after = template.split("{text}")
        head, tail = layout.spec.template.parts(before), layout.spec.template.parts(after)
        control = layout.spec.template.control
        self.pre = head.pop() if head and head[-1] not in control else ""
        self.post = tail.pop(0) if tail and tail[0] not in control else ""
        self.head = layout._constant(layout._ids(head))
        self.tail = layout._constant(layout._ids(tail))
        self.pre_alone = layout._constant(layout._ids([self.pre] if self.pre else []))
        self.image = layout._image

    def add(self, chunks: list[str], pieces: list[int], texts: list[str], supervised: bytearray, base: int) -> None:
        """Append the pieces of one turn whose text is `chunks` with an image between each two."""
        pieces.append(self.head)
        last = len(chunks) - 1
        for k, chunk in enumerate(chunks):
            text = chunk
            if k == 0:
                text = self.pre + text
            else:
                pieces.append(self.image)
            if k == last:
                text += self.post
            if k == 0 and last > 0 and not chunk:
                pieces.append(self.pre_alone)
            elif text:
                pieces.append(base + len(texts))
                texts.append(text)
                supervised.append(0)
        pieces.append(self.tail)
