"""Records to token ids and labels, many at a time, as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from llava_tune.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava_tune.data.plain import PlainRecords
from llava_tune.data.records import Record
from llava_tune.data.tokens.encoder import Encoder
from llava_tune.data.tokens.templates import Template
from llava_tune.data.tokens.tokenizer import Vocabulary
from llava_tune.errors import InputError


@dataclass(frozen=True)
class LayoutSpec:
    """All that decides a record's ids and labels, free of any tokenizer object (it travels to worker processes)."""

    plain_json: str
    cut_after: tuple[int, ...] | None
    template: Template
    control_ids: dict[str, int]
    forbidden: tuple[int, ...]
    bos: int | None
    longest: int
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
        control = {c: vocabulary.added[c] for c in template.control if c in vocabulary.added}
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
        return LayoutSpec(
            vocabulary.plain_json,
            vocabulary.cut_after,
            template,
            control,
            forbidden,
            vocabulary.bos,
            vocabulary.longest,
            max_length,
            image_tokens,
            image_position,
        )


@dataclass
class TokenizedBatch:
    """Samples behind one another.

    Attributes:
        input_ids: int32 [tokens], an image is one IMAGE_TOKEN_INDEX.
        labels: int32 [tokens], IGNORE_INDEX where unsupervised.
        offsets: int64 [samples + 1] into both.
        lengths: int32 [samples], tokens after each image has become its patches.
        ids, images: of each sample.
        rows: int64 [samples], the index of each sample's record among those given.
        unsupervised: (index into the records given, why) of the records that gave no sample.
        cut: (index into the records given, its tokens before, supervised tokens lost) of the samples cut to max_length.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    ids: list[str]
    images: list[list[str]]
    rows: np.ndarray
    unsupervised: list[tuple[int, str]] = field(default_factory=list)
    cut: list[tuple[int, int, int]] = field(default_factory=list)

    def keep(self, wanted: np.ndarray) -> TokenizedBatch:
        """The samples for which `wanted` (bool [samples]) is true."""
        counts = np.diff(self.offsets)
        tokens = np.repeat(wanted, counts)
        rows = np.flatnonzero(wanted).tolist()
        return replace(
            self,
            input_ids=self.input_ids[tokens],
            labels=self.labels[tokens],
            offsets=np.concatenate([[0], np.cumsum(counts[wanted])]),
            lengths=self.lengths[wanted],
            ids=[self.ids[i] for i in rows],
            images=[self.images[i] for i in rows],
            rows=self.rows[wanted],
        )


def merge(first: TokenizedBatch, second: TokenizedBatch) -> TokenizedBatch:
    """Two batches as one, in the order of their `rows`."""
    rows = np.concatenate([first.rows, second.rows])
    order = np.argsort(rows, kind="stable")
    input_ids = np.concatenate([first.input_ids, second.input_ids])
    labels = np.concatenate([first.labels, second.labels])
    counts = np.concatenate([np.diff(first.offsets), np.diff(second.offsets)])
    starts = (np.cumsum(counts) - counts)[order]
    offsets = np.concatenate([[0], np.cumsum(counts[order])])
    gather = np.arange(len(input_ids)) + np.repeat(starts - offsets[:-1], counts[order])
    ids, images = first.ids + second.ids, first.images + second.images
    return TokenizedBatch(
        input_ids[gather],
        labels[gather],
        offsets,
        np.concatenate([first.lengths, second.lengths])[order],
        [ids[i] for i in order.tolist()],
        [images[i] for i in order.tolist()],
        rows[order],
        sorted(first.unsupervised + second.unsupervised),
        sorted(first.cut + second.cut),
    )


class Layout:
    """Lays out records in a chat template. One sample is a run of pieces; a piece is a constant or an encoded text.

    All texts of a batch are encoded in one call; ids and labels then are one gather each, without a Python loop over
    tokens.
    """

    def __init__(self, spec: LayoutSpec, encoder: Encoder | None = None) -> None:
        self.spec = spec
        self.encoder = encoder or Encoder(spec.plain_json, spec.cut_after)
        self._forbidden = np.array(spec.forbidden, np.int32)
        self._most_characters = (spec.max_length + 1) * spec.longest
        self._constants: list[np.ndarray] = []
        self._supervised: list[bool] = []
        template = spec.template
        self._empty = self._constant([])
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
            ids.extend(
                [control] if control is not None else self.encoder.encode([part], self._forbidden).of(0).tolist()
            )
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
        flags = np.frombuffer(supervised, np.uint8).astype(bool)
        ids, images = [r.id for r in records], [r.images for r in records]
        return self._assemble(ids, images, np.array(pieces, np.int64), np.array(bounds), texts, flags)

    def tokenize_plain(self, plain: PlainRecords, ids: list[str]) -> TokenizedBatch:
        """Tokenize plain records, all pieces laid out by numpy; what `tokenize` gives for the same records."""
        slot, has_image = self._instruction, plain.has_image
        pre, post = slot.pre, slot.post
        flags = has_image.tolist()
        texts = [q + post if image else pre + q + post for q, image in zip(plain.questions, flags, strict=True)]
        n, base = len(texts), len(self._constants)
        texts += plain.answers
        rounds = np.empty((n, 8), np.int64)
        rounds[:, 0] = slot.head
        rounds[:, 1] = np.where(has_image, slot.pre_alone, self._empty)
        rounds[:, 2] = np.where(has_image, self._image, self._empty)
        rounds[:, 3] = np.arange(base, base + n)
        rounds[:, 4] = slot.tail
        rounds[:, 5] = np.arange(base + n, base + 2 * n)
        rounds[:, 6], rounds[:, 7] = self._suffix, self._sep
        opening: list[int] = [self._bos]
        if system := self.spec.template.default_system:
            opening += (self._system.head, base + len(texts), self._system.tail)
            texts.append(self._system.pre + system + self._system.post)
        sizes = len(opening) + 8 * plain.rounds
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        pieces = np.empty(int(bounds[-1]), np.int64)
        first = bounds[:-1, None] + np.arange(len(opening))
        in_rounds = np.ones(len(pieces), bool)
        in_rounds[first] = False
        pieces[first] = opening
        pieces[in_rounds] = rounds.reshape(-1)
        supervised = np.zeros(len(texts), bool)
        supervised[n : 2 * n] = True
        return self._assemble(ids, plain.images, pieces, bounds, texts, supervised)

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
        self,
        ids: list[str],
        images: list[list[str]],
        pieces: np.ndarray,
        bounds: np.ndarray,
        texts: list[str],
        supervised: np.ndarray,
    ) -> TokenizedBatch:
        most = self._most_characters
        if max(map(len, texts), default=0) > most:  # what lies behind can't be within max_length, whatever its tokens
            texts = [text[:most] for text in texts]
        encoded = self.encoder.encode(texts, self._forbidden)
        # A piece is one or more units: a constant is one, a text is its words. A unit is a run of ids in the pool.
        constants = self._constants
        n = len(constants)
        pool = np.concatenate([*constants, encoded.ids])
        unit_lengths = np.concatenate([[len(c) for c in constants], np.diff(encoded.offsets)])
        unit_starts = np.cumsum(unit_lengths) - unit_lengths
        piece_units = np.concatenate([np.arange(n), encoded.codes + n])
        piece_starts = np.concatenate([np.arange(n), encoded.text_offsets[:-1] + n])
        piece_lengths = np.concatenate([np.ones(n, np.int64), np.diff(encoded.text_offsets)])
        is_supervised = np.concatenate([self._supervised, supervised])

        sizes = piece_lengths[pieces]
        units = piece_units[_ranges(piece_starts[pieces], sizes)]
        lengths = unit_lengths[units]
        input_ids = pool[_ranges(unit_starts[units], lengths)]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        in_piece = np.diff(ends[np.concatenate([[0], np.cumsum(sizes)])])
        labels = np.where(np.repeat(is_supervised[pieces], in_piece), input_ids, np.int32(IGNORE_INDEX))
        sample_offsets = np.concatenate([[0], np.cumsum(in_piece)])[bounds]
        images_in = np.fromiter(map(len, images), np.int64, len(images))
        total = np.diff(sample_offsets) + images_in * (self.spec.image_tokens - 1)
        batch = TokenizedBatch(
            input_ids,
            labels,
            sample_offsets,
            total.astype(np.int32),
            ids,
            images,
            np.arange(len(ids)),
        )
        return self._truncate(batch) if (total > self.spec.max_length).any() else batch

    def _truncate(self, batch: TokenizedBatch) -> TokenizedBatch:
        """Cut samples to max_length (an image is whole or gone) and leave out those with nothing supervised left."""
        stays = np.ones(len(batch.input_ids), bool)
        whole = np.ones(len(batch.ids), bool)
        limit = self.spec.max_length
        kept = np.diff(batch.offsets)
        batch.images = list(batch.images)
        for i in np.flatnonzero(batch.lengths > limit).tolist():
            a, b = int(batch.offsets[i]), int(batch.offsets[i + 1])
            row = batch.input_ids[a:b]
            sizes = np.cumsum(np.where(row == IMAGE_TOKEN_INDEX, self.spec.image_tokens, 1))
            n = int(np.searchsorted(sizes, limit, side="right"))
            batch.cut.append((i, int(sizes[-1]), int(np.count_nonzero(batch.labels[a + n : b] != IGNORE_INDEX))))
            if (batch.labels[a : a + n] == IGNORE_INDEX).all():
                batch.unsupervised.append(
                    (i, f"nothing supervised within max_length {limit} (it has {sizes[-1]} tokens)")
                )
                whole[i] = False
            stays[a + n : b] = False
            kept[i] = n
            batch.images[i] = batch.images[i][: int((row[:n] == IMAGE_TOKEN_INDEX).sum())]
            batch.lengths[i] = sizes[n - 1] if n else 0
        batch.input_ids, batch.labels = batch.input_ids[stays], batch.labels[stays]
        batch.offsets = np.concatenate([[0], np.cumsum(kept)])
        return batch if whole.all() else batch.keep(whole)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The ranges [start, start + length) behind one another, int64."""
    ends = np.cumsum(lengths)
    found = np.arange(int(ends[-1]) if len(ends) else 0)
    found += np.repeat(starts - (ends - lengths), lengths)
    return found


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
